# fish completion for sendense-restore. Made by tools/docs; change tools/pages/templates/fish or the commands.

function __sendense_restore_given # the words before the cursor that are neither options nor their values
    set -l skip no
    set -l ended no
    for word in (commandline -opc)[2..-1]
        if test $skip = yes
            set skip no
        else if test $ended = no -a "$word" = --
            set ended yes
        else if test $ended = no; and string match -qr -- '^-.' $word
            if contains -- $word --depth --disk --idle-timeout --journal --kind --limit --max-depth --max-size --min-size --mount --name --newer --older --on-behalf-of --parent --repository --status --stream --vm
                set skip yes
            end
        else
            printf '%s\n' $word
        end
    end
end

function __sendense_restore_at # whether the cursor is in command $argv[1], at its argument number $argv[2]
    set -l given (__sendense_restore_given)
    set -l command (string split -n ' ' -- $argv[1])
    set -l depth (count $command)
    if test $depth -gt 0
        test (count $given) -ge $depth; or return 1
        test "$given[1..$depth]" = "$command"; or return 1
    else
        test (count $given) -eq 0; or return 1
    end
    if set -q argv[2]
        test (count $given) -eq (math $depth + $argv[2] - 1)
    end
end

function __sendense_restore_ask # the service, never with a question to the person
    set -l program (commandline -opc)[1]
    command $program $argv </dev/null 2>/dev/null
end

function __sendense_restore_ids # the first column of what a command lists, and in it what is an id
    __sendense_restore_ask $argv | sed 1d | string match -r '^[A-Za-z0-9._-]{1,64}(?=  )'
end

function __sendense_restore_mount
    __sendense_restore_ids mounts
end

function __sendense_restore_backup
    __sendense_restore_ids backups
end

function __sendense_restore_repository
    __sendense_restore_ids catalog repositories
end

function __sendense_restore_guest # paths below the mount that stands before
    set -l typed (commandline -ct | string unescape)
    if not string match -q -- '/*' $typed
        printf '/\n'
        return
    end
    set -l directory (string replace -r '[^/]*$' '' -- $typed)
    # A name that could move the cursor is not for the command line.
    for name in (__sendense_restore_ask ls -p -0 (__sendense_restore_given)[2] $directory | string split0)
        string match -qr '[[:cntrl:]]' -- $name; or printf '%s\n' $directory$name
    end
end

complete -c sendense-restore -f
# the program itself
complete -c sendense-restore -n '__sendense_restore_at \'\' 1' -a backups -d 'List the backups of the catalogue, newest first'
complete -c sendense-restore -n '__sendense_restore_at \'\' 1' -a mount -d 'Mount a backup read-only, or join those who have it mounted'
complete -c sendense-restore -n '__sendense_restore_at \'\' 1' -a mounts -d 'List your mounts. Root, and whoever may read those of others, sees all of them'
complete -c sendense-restore -n '__sendense_restore_at \'\' 1' -a volumes -d 'List a mount\'s volumes, and why those that are not open are not'
complete -c sendense-restore -n '__sendense_restore_at \'\' 1' -a ls -d 'List a guest directory'
complete -c sendense-restore -n '__sendense_restore_at \'\' 1' -a tree -d 'Draw a guest directory and all that is below it'
complete -c sendense-restore -n '__sendense_restore_at \'\' 1' -a find -d 'Find guest files below a directory by name, kind, size or time'
complete -c sendense-restore -n '__sendense_restore_at \'\' 1' -a stat -d 'Show what is known of one guest file'
complete -c sendense-restore -n '__sendense_restore_at \'\' 1' -a cat -d 'Write a guest file to standard output, byte for byte'
complete -c sendense-restore -n '__sendense_restore_at \'\' 1' -a get -d 'Restore a guest file to this host'
complete -c sendense-restore -n '__sendense_restore_at \'\' 1' -a unmount -d 'Give a mount back'
complete -c sendense-restore -n '__sendense_restore_at \'\' 1' -a status -d 'Show what the service uses and has left'
complete -c sendense-restore -n '__sendense_restore_at \'\' 1' -a events -d 'Show what has happened, newest first: who asked for what, and how it ended'
complete -c sendense-restore -n '__sendense_restore_at \'\' 1' -a shell -d 'Open a shell as root where the mounts are'
complete -c sendense-restore -n '__sendense_restore_at \'\' 1' -a catalog -d 'Show the catalogue of backups, and fill the embedded one'
complete -c sendense-restore -n '__sendense_restore_at \'\'' -l version -d 'Print the version.'
complete -c sendense-restore -n '__sendense_restore_at \'\'' -l help -d 'Show this message and exit.'
# backups
complete -c sendense-restore -n '__sendense_restore_at \'backups\'' -l vm -x -d 'Only backups of this virtual machine.'
complete -c sendense-restore -n '__sendense_restore_at \'backups\'' -l status -x -d 'Only backups in this state.'
complete -c sendense-restore -n '__sendense_restore_at \'backups\'' -l repository -x -a '(__sendense_restore_repository)' -d 'Only backups in this repository.'
complete -c sendense-restore -n '__sendense_restore_at \'backups\'' -l limit -x -d 'At most N of them; 0 for all.'
complete -c sendense-restore -n '__sendense_restore_at \'backups\'' -l json -d 'Print one JSON document; an error is one as well, on stderr.'
complete -c sendense-restore -n '__sendense_restore_at \'backups\'' -l help -d 'Show this message and exit.'
# mount
complete -c sendense-restore -n '__sendense_restore_at \'mount\'' -l disk -x -d 'The disk\'s index; 0 if not given.'
complete -c sendense-restore -n '__sendense_restore_at \'mount\'' -l all-disks -d 'Mount all disks of the backup together.'
complete -c sendense-restore -n '__sendense_restore_at \'mount\'' -l journal -x -a 'replay as-crashed' -d 'Replay journals, or show what was on disk.'
complete -c sendense-restore -n '__sendense_restore_at \'mount\'' -l idle-timeout -x -d 'How long you keep it without using it, such as 30min or 2h.'
complete -c sendense-restore -n '__sendense_restore_at \'mount\'' -l wait -d 'Where there is no room, wait for it instead of giving up.'
complete -c sendense-restore -n '__sendense_restore_at \'mount\'' -l on-behalf-of -x -d 'The person on whose behalf you act, if you are allowed to; the claim on the mount is theirs.'
complete -c sendense-restore -n '__sendense_restore_at \'mount\'' -l json -d 'Print one JSON document; an error is one as well, on stderr.'
complete -c sendense-restore -n '__sendense_restore_at \'mount\'' -l help -d 'Show this message and exit.'
complete -c sendense-restore -n '__sendense_restore_at \'mount\' 1' -a '(__sendense_restore_backup)'
# mounts
complete -c sendense-restore -n '__sendense_restore_at \'mounts\'' -l json -d 'Print one JSON document; an error is one as well, on stderr.'
complete -c sendense-restore -n '__sendense_restore_at \'mounts\'' -l help -d 'Show this message and exit.'
# volumes
complete -c sendense-restore -n '__sendense_restore_at \'volumes\'' -l json -d 'Print one JSON document; an error is one as well, on stderr.'
complete -c sendense-restore -n '__sendense_restore_at \'volumes\'' -l help -d 'Show this message and exit.'
complete -c sendense-restore -n '__sendense_restore_at \'volumes\' 1' -a '(__sendense_restore_mount)'
# ls
complete -c sendense-restore -n '__sendense_restore_at \'ls\'' -l long -s l -d 'With kind, permissions, size and time.'
complete -c sendense-restore -n '__sendense_restore_at \'ls\'' -l mark -s p -d 'Append a / to directories.'
complete -c sendense-restore -n '__sendense_restore_at \'ls\'' -l null -s 0 -d 'End each with a NUL character instead of a newline, as \'xargs -0\' takes them.'
complete -c sendense-restore -n '__sendense_restore_at \'ls\'' -l json -d 'Print one JSON document; an error is one as well, on stderr.'
complete -c sendense-restore -n '__sendense_restore_at \'ls\'' -l help -d 'Show this message and exit.'
complete -c sendense-restore -n '__sendense_restore_at \'ls\' 1' -a '(__sendense_restore_mount)'
complete -c sendense-restore -n '__sendense_restore_at \'ls\' 2' -a '(__sendense_restore_guest)'
# tree
complete -c sendense-restore -n '__sendense_restore_at \'tree\'' -l depth -x -d 'How many levels to go down; 1 is what lies in PATH itself, 0 is no limit.'
complete -c sendense-restore -n '__sendense_restore_at \'tree\'' -l all -s a -d 'Also what begins with a dot.'
complete -c sendense-restore -n '__sendense_restore_at \'tree\'' -l json -d 'Print one JSON document; an error is one as well, on stderr.'
complete -c sendense-restore -n '__sendense_restore_at \'tree\'' -l help -d 'Show this message and exit.'
complete -c sendense-restore -n '__sendense_restore_at \'tree\' 1' -a '(__sendense_restore_mount)'
complete -c sendense-restore -n '__sendense_restore_at \'tree\' 2' -a '(__sendense_restore_guest)'
# find
complete -c sendense-restore -n '__sendense_restore_at \'find\'' -l name -x -d 'Only what has such a name, as in \'*.conf\'.'
complete -c sendense-restore -n '__sendense_restore_at \'find\'' -l kind -x -a 'file directory symlink fifo socket block char volume' -d 'Only this kind of file.'
complete -c sendense-restore -n '__sendense_restore_at \'find\'' -l min-size -x -d 'Only what has at least this size, such as 10M or 1.5GiB.'
complete -c sendense-restore -n '__sendense_restore_at \'find\'' -l max-size -x -d 'Only what has at most this size.'
complete -c sendense-restore -n '__sendense_restore_at \'find\'' -l newer -x -d 'Only what was modified since: a date or time, or 7d for a week ago.'
complete -c sendense-restore -n '__sendense_restore_at \'find\'' -l older -x -d 'Only what was not modified after that.'
complete -c sendense-restore -n '__sendense_restore_at \'find\'' -l max-depth -x -d 'How many levels to go down; 1 is what lies in PATH itself, 0 is no limit.'
complete -c sendense-restore -n '__sendense_restore_at \'find\'' -l limit -x -d 'End after N; 0 is no limit.'
complete -c sendense-restore -n '__sendense_restore_at \'find\'' -l long -s l -d 'With kind, permissions, size and time.'
complete -c sendense-restore -n '__sendense_restore_at \'find\'' -l null -s 0 -d 'End each with a NUL character instead of a newline, as \'xargs -0\' takes them.'
complete -c sendense-restore -n '__sendense_restore_at \'find\'' -l json -d 'Print one JSON document; an error is one as well, on stderr.'
complete -c sendense-restore -n '__sendense_restore_at \'find\'' -l help -d 'Show this message and exit.'
complete -c sendense-restore -n '__sendense_restore_at \'find\' 1' -a '(__sendense_restore_mount)'
complete -c sendense-restore -n '__sendense_restore_at \'find\' 2' -a '(__sendense_restore_guest)'
# stat
complete -c sendense-restore -n '__sendense_restore_at \'stat\'' -l json -d 'Print one JSON document; an error is one as well, on stderr.'
complete -c sendense-restore -n '__sendense_restore_at \'stat\'' -l help -d 'Show this message and exit.'
complete -c sendense-restore -n '__sendense_restore_at \'stat\' 1' -a '(__sendense_restore_mount)'
complete -c sendense-restore -n '__sendense_restore_at \'stat\' 2' -a '(__sendense_restore_guest)'
# cat
complete -c sendense-restore -n '__sendense_restore_at \'cat\'' -l stream -x -d 'That alternate stream of the file or directory (NTFS), such as Zone.Identifier; \'stat\' shows those it has.'
complete -c sendense-restore -n '__sendense_restore_at \'cat\'' -l json -d 'Print one JSON document; an error is one as well, on stderr.'
complete -c sendense-restore -n '__sendense_restore_at \'cat\'' -l help -d 'Show this message and exit.'
complete -c sendense-restore -n '__sendense_restore_at \'cat\' 1' -a '(__sendense_restore_mount)'
complete -c sendense-restore -n '__sendense_restore_at \'cat\' 2' -a '(__sendense_restore_guest)'
# get
complete -c sendense-restore -n '__sendense_restore_at \'get\'' -l stream -x -d 'That alternate stream of the file or directory (NTFS), such as Zone.Identifier; \'stat\' shows those it has.'
complete -c sendense-restore -n '__sendense_restore_at \'get\'' -l force -d 'Replace the file that is there.'
complete -c sendense-restore -n '__sendense_restore_at \'get\'' -l json -d 'Print one JSON document; an error is one as well, on stderr.'
complete -c sendense-restore -n '__sendense_restore_at \'get\'' -l help -d 'Show this message and exit.'
complete -c sendense-restore -n '__sendense_restore_at \'get\' 1' -a '(__sendense_restore_mount)'
complete -c sendense-restore -n '__sendense_restore_at \'get\' 2' -a '(__sendense_restore_guest)'
complete -c sendense-restore -n '__sendense_restore_at \'get\' 3' -F
# unmount
complete -c sendense-restore -n '__sendense_restore_at \'unmount\'' -l force -d 'Close it for everybody, also while files of it are read.'
complete -c sendense-restore -n '__sendense_restore_at \'unmount\'' -l expired -d 'Instead of one: end all whose time is up or whose backup is gone.'
complete -c sendense-restore -n '__sendense_restore_at \'unmount\'' -l on-behalf-of -x -d 'The person on whose behalf you act, if you are allowed to; the claim on the mount is theirs.'
complete -c sendense-restore -n '__sendense_restore_at \'unmount\'' -l json -d 'Print one JSON document; an error is one as well, on stderr.'
complete -c sendense-restore -n '__sendense_restore_at \'unmount\'' -l help -d 'Show this message and exit.'
complete -c sendense-restore -n '__sendense_restore_at \'unmount\' 1' -a '(__sendense_restore_mount)'
# status
complete -c sendense-restore -n '__sendense_restore_at \'status\'' -l in-use -d 'List the image files that are held open instead.'
complete -c sendense-restore -n '__sendense_restore_at \'status\'' -l json -d 'Print one JSON document; an error is one as well, on stderr.'
complete -c sendense-restore -n '__sendense_restore_at \'status\'' -l help -d 'Show this message and exit.'
# events
complete -c sendense-restore -n '__sendense_restore_at \'events\'' -l mount -x -a '(__sendense_restore_mount)' -d 'Only what concerns this mount.'
complete -c sendense-restore -n '__sendense_restore_at \'events\'' -l limit -x -d 'At most N of them; 0 for all.'
complete -c sendense-restore -n '__sendense_restore_at \'events\'' -l json -d 'Print one JSON document; an error is one as well, on stderr.'
complete -c sendense-restore -n '__sendense_restore_at \'events\'' -l help -d 'Show this message and exit.'
# shell
complete -c sendense-restore -n '__sendense_restore_at \'shell\'' -l help -d 'Show this message and exit.'
# catalog
complete -c sendense-restore -n '__sendense_restore_at \'catalog\' 1' -a vms -d 'List the virtual machines that have backups'
complete -c sendense-restore -n '__sendense_restore_at \'catalog\' 1' -a repositories -d 'List the repositories of backups'
complete -c sendense-restore -n '__sendense_restore_at \'catalog\' 1' -a add-repository -d 'Add a directory of images'
complete -c sendense-restore -n '__sendense_restore_at \'catalog\' 1' -a scan -d 'Look for new backups in a repository'
complete -c sendense-restore -n '__sendense_restore_at \'catalog\' 1' -a add -d 'Add a backup by hand'
complete -c sendense-restore -n '__sendense_restore_at \'catalog\' 1' -a remove-repository -d 'Forget a repository and its backups'
complete -c sendense-restore -n '__sendense_restore_at \'catalog\' 1' -a remove-backup -d 'Forget a backup'
complete -c sendense-restore -n '__sendense_restore_at \'catalog\'' -l help -d 'Show this message and exit.'
# catalog vms
complete -c sendense-restore -n '__sendense_restore_at \'catalog vms\'' -l json -d 'Print one JSON document; an error is one as well, on stderr.'
complete -c sendense-restore -n '__sendense_restore_at \'catalog vms\'' -l help -d 'Show this message and exit.'
# catalog repositories
complete -c sendense-restore -n '__sendense_restore_at \'catalog repositories\'' -l json -d 'Print one JSON document; an error is one as well, on stderr.'
complete -c sendense-restore -n '__sendense_restore_at \'catalog repositories\'' -l help -d 'Show this message and exit.'
# catalog add-repository
complete -c sendense-restore -n '__sendense_restore_at \'catalog add-repository\'' -l json -d 'Print one JSON document; an error is one as well, on stderr.'
complete -c sendense-restore -n '__sendense_restore_at \'catalog add-repository\'' -l help -d 'Show this message and exit.'
complete -c sendense-restore -n '__sendense_restore_at \'catalog add-repository\' 2' -a '(__fish_complete_directories)'
# catalog scan
complete -c sendense-restore -n '__sendense_restore_at \'catalog scan\'' -l json -d 'Print one JSON document; an error is one as well, on stderr.'
complete -c sendense-restore -n '__sendense_restore_at \'catalog scan\'' -l help -d 'Show this message and exit.'
complete -c sendense-restore -n '__sendense_restore_at \'catalog scan\' 1' -a '(__sendense_restore_repository)'
# catalog add
complete -c sendense-restore -n '__sendense_restore_at \'catalog add\'' -l parent -x -a '(__sendense_restore_backup)' -d 'The backup that it builds on.'
complete -c sendense-restore -n '__sendense_restore_at \'catalog add\'' -l json -d 'Print one JSON document; an error is one as well, on stderr.'
complete -c sendense-restore -n '__sendense_restore_at \'catalog add\'' -l help -d 'Show this message and exit.'
complete -c sendense-restore -n '__sendense_restore_at \'catalog add\' 1' -a '(__sendense_restore_repository)'
# catalog remove-repository
complete -c sendense-restore -n '__sendense_restore_at \'catalog remove-repository\'' -l json -d 'Print one JSON document; an error is one as well, on stderr.'
complete -c sendense-restore -n '__sendense_restore_at \'catalog remove-repository\'' -l help -d 'Show this message and exit.'
complete -c sendense-restore -n '__sendense_restore_at \'catalog remove-repository\' 1' -a '(__sendense_restore_repository)'
# catalog remove-backup
complete -c sendense-restore -n '__sendense_restore_at \'catalog remove-backup\'' -l json -d 'Print one JSON document; an error is one as well, on stderr.'
complete -c sendense-restore -n '__sendense_restore_at \'catalog remove-backup\'' -l help -d 'Show this message and exit.'
complete -c sendense-restore -n '__sendense_restore_at \'catalog remove-backup\' 1' -a '(__sendense_restore_backup)'
