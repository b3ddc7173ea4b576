# bash completion for sendense-restore. Made by tools/docs; change tools/pages/templates/bash or the commands.

_sendense_restore_know() { # what may follow command $1: sets commands, options, arguments and values
    commands='' options='' arguments=() values=()
    case $1 in
        '')
            commands='backups mount mounts volumes ls tree find stat cat get unmount status events shell catalog'
            options='--version --help'
            ;;
        'backups')
            options='--vm --status --repository --limit --json --help'
            values[--vm]='none'
            values[--status]='none'
            values[--repository]='repository'
            values[--limit]='none'
            ;;
        'mount')
            options='--disk --all-disks --journal --idle-timeout --wait --on-behalf-of --json --help'
            arguments=(backup)
            values[--disk]='none'
            values[--journal]='choice replay as-crashed'
            values[--idle-timeout]='none'
            values[--on-behalf-of]='none'
            ;;
        'mounts')
            options='--json --help'
            ;;
        'volumes')
            options='--json --help'
            arguments=(mount)
            ;;
        'ls')
            options='-l --long -p --mark -0 --null --json --help'
            arguments=(mount guest)
            ;;
        'tree')
            options='--depth -a --all --json --help'
            arguments=(mount guest)
            values[--depth]='none'
            ;;
        'find')
            options='--name --kind --min-size --max-size --newer --older --max-depth --limit -l --long -0 --null --json --help'
            arguments=(mount guest)
            values[--name]='none'
            values[--kind]='choice file directory symlink fifo socket block char volume'
            values[--min-size]='none'
            values[--max-size]='none'
            values[--newer]='none'
            values[--older]='none'
            values[--max-depth]='none'
            values[--limit]='none'
            ;;
        'stat')
            options='--json --help'
            arguments=(mount guest)
            ;;
        'cat')
            options='--stream --json --help'
            arguments=(mount guest)
            values[--stream]='none'
            ;;
        'get')
            options='--stream --force --json --help'
            arguments=(mount guest file)
            values[--stream]='none'
            ;;
        'unmount')
            options='--force --expired --on-behalf-of --json --help'
            arguments=(mount)
            values[--on-behalf-of]='none'
            ;;
        'status')
            options='--in-use --json --help'
            ;;
        'events')
            options='--mount --limit --json --help'
            values[--mount]='mount'
            values[--limit]='none'
            ;;
        'shell')
            options='--help'
            ;;
        'catalog')
            commands='vms repositories add-repository scan add remove-repository remove-backup'
            options='--help'
            ;;
        'catalog vms')
            options='--json --help'
            ;;
        'catalog repositories')
            options='--json --help'
            ;;
        'catalog add-repository')
            options='--json --help'
            arguments=(none directory)
            ;;
        'catalog scan')
            options='--json --help'
            arguments=(repository)
            ;;
        'catalog add')
            options='--parent --json --help'
            arguments=(repository none none)
            values[--parent]='backup'
            ;;
        'catalog remove-repository')
            options='--json --help'
            arguments=(repository)
            ;;
        'catalog remove-backup')
            options='--json --help'
            arguments=(backup)
            ;;
    esac
}

_sendense_restore_ask() { # the service, never with a question to the person
    "$program" "$@" </dev/null 2>/dev/null
}

_sendense_restore_ids() { # the first column of what a command lists, and in it what is an id
    _sendense_restore_ask "$@" | sed -n '2,$s/^\([A-Za-z0-9._-]\{1,64\}\)  .*/\1/p'
}

_sendense_restore_guest() { # guest paths of mount $1 that begin with $2, into COMPREPLY
    local directory=${2%/*} name
    if [[ $2 != /* ]]; then
        if [[ -z $2 ]]; then COMPREPLY=(/) && compopt -o nospace; fi
        return
    fi
    while IFS= read -r -d '' name; do
        # A name that could move the cursor is not for the command line.
        if [[ $name != *[[:cntrl:]]* && $directory/$name == "$2"* ]]; then COMPREPLY+=("$directory/$name"); fi
    done < <(_sendense_restore_ask ls -p -0 "$1" "${directory:-/}")
    if [[ ${#COMPREPLY[@]} -eq 1 && $COMPREPLY == */ ]]; then compopt -o nospace; fi
}

_sendense_restore_plain() { # $1 as it is without its quotes; cut: where readline's own word begins; quote: an open one
    local text=$1 before=0 i c
    plain='' cut=0 quote=''
    for ((i = 0; i < ${#text}; i++)); do
        c=${text:i:1}
        if [[ $c == \\ && $quote != \' ]]; then
            i=$((i + 1))
            plain+=${text:i:1}
        elif [[ -n $quote && $c == "$quote" ]]; then
            quote='' cut=$before
        elif [[ -z $quote && ($c == \' || $c == \") ]]; then
            quote=$c before=$cut cut=${#plain}
        else
            plain+=$c
            if [[ -z $quote && $COMP_WORDBREAKS == *"$c"* ]]; then cut=${#plain}; fi
        fi
    done
}

_sendense_restore_quoted() { # $1 as it must be written within the quotes that are open
    case $quote in
        \') printf '%s' "${1//\'/\'\\\'\'}" ;;
        \") printf '%s' "$1" | sed 's/[\\"$`]/\\&/g' ;;
        *) if [[ -n $1 ]]; then printf '%q' "$1"; fi ;;
    esac
}

_sendense_restore() {
    COMPREPLY=()
    # Readline breaks words at : and = and @ as well; they are put together again here.
    local words=() line=${COMP_LINE:0:COMP_POINT} rest word i
    for ((i = 0; i <= COMP_CWORD; i++)); do
        rest=${line#"${line%%[![:blank:]]*}"}
        word=${COMP_WORDS[i]}
        if ((i == COMP_CWORD)); then word=$rest; fi
        if ((i > 0)) && [[ $rest == "$line" ]]; then
            words[${#words[@]} - 1]+=$word
        else
            words+=("$word")
        fi
        line=${rest#"$word"}
    done

    local plain cut quote program command='' commands options value='' ended='' given=()
    local -a arguments
    local -A values
    _sendense_restore_plain "${words[0]}"
    program=$plain
    _sendense_restore_know ''
    for ((i = 1; i < ${#words[@]} - 1; i++)); do
        _sendense_restore_plain "${words[i]}"
        if [[ -n $value ]]; then
            value=''
        elif [[ -z $ended && $plain == -- ]]; then
            ended=yes
        elif [[ -z $ended && $plain == -?* ]]; then
            value=${values[$plain]:-}
        elif [[ " $commands " == *" $plain "* && -n $plain ]]; then
            command+=${command:+ }$plain
            _sendense_restore_know "$command"
        else
            given+=("$plain")
        fi
    done
    _sendense_restore_plain "${words[i]}"

    local current=$plain before='' candidates=''
    if [[ -z $value && -z $ended && $current == --*=* ]]; then
        value=${values[${current%%=*}]:-none}
        before=${current%%=*}= current=${current#*=}
    elif [[ -z $value && -z $ended && $current == -* ]]; then
        value="choice $options"
    elif [[ -z $value && -n $commands ]]; then
        value="choice $commands"
    elif [[ -z $value ]]; then
        value=${arguments[${#given[@]}]:-none}
    fi
    case $value in
        choice\ *) candidates=${value#choice } ;;
        mount) candidates=$(_sendense_restore_ids mounts) ;;
        backup) candidates=$(_sendense_restore_ids backups) ;;
        repository) candidates=$(_sendense_restore_ids catalog repositories) ;;
        guest) _sendense_restore_guest "${given[0]}" "$current" ;;
        file) compopt -o default ;;
        directory) compopt -o dirnames ;;
    esac
    local IFS=$' \n'
    for word in $candidates; do
        if [[ $word == "$current"* ]]; then COMPREPLY+=("$word"); fi
    done
    for i in "${!COMPREPLY[@]}"; do
        word=$before${COMPREPLY[i]}
        # Readline would leave "$" as it is, and a guest's name is not for the shell to expand.
        COMPREPLY[i]=$(_sendense_restore_quoted "${word:cut}")
    done
}

complete -F _sendense_restore sendense-restore
