# sh mount_steps.sh IMAGE DIRECTORY [START SIZE TYPE]...: what a person would type to look into a backup.
#
# An overlay over the image, the image served as a file, a loop device over each partition, each mounted read-only; then
# it says "mounted", waits for the end of its input, and takes all of it away in reverse. DIRECTORY is empty, and is
# removed in the end. Start and size of partitions are in sectors of 512 bytes; without them, and the types, it asks
# sfdisk and blkid.
set -eu
image=$1 work=$2 pid= volumes=
shift 2

take_away() {
    for volume in $volumes; do umount "$work/${volume%%:*}"; done
    for volume in $volumes; do losetup --detach "${volume#*:}"; done
    if [ -n "$pid" ]; then
        kill "$pid"
        # Its signal handler only sets a flag, which its main loop may just have looked at: have it go round once more.
        [ -e "$work/disk" ] || :
        read -r _ <&8 || :
    fi
    rm -r "$work"
}
# Whatever goes wrong, and whoever stops reading: nothing stays.
trap 'set +e; take_away' EXIT

qemu-img create -q -f qcow2 -o extended_l2=on,cluster_size=128k -b "$image" -F qcow2 "$work/overlay"
: >"$work/disk"
# Held by the server alone, so that the pipe's end tells when it has gone.
mkfifo "$work/gone"
exec 9<>"$work/gone" 8<"$work/gone"
qemu-storage-daemon --daemonize --pidfile "$work/pid" \
    --blockdev "driver=qcow2,node-name=disk,file.driver=file,file.filename=$work/overlay" \
    --export "type=fuse,id=disk,node-name=disk,mountpoint=$work/disk,writable=on"
exec 9>&-
read -r pid <"$work/pid"

if [ $# -eq 0 ]; then
    sfdisk --dump "$work/disk" | sed -n 's/.*start= *\([0-9]*\), size= *\([0-9]*\).*/\1 \2/p' >"$work/table"
else
    while [ $# -gt 0 ]; do
        echo "$1 $2 $3"
        shift 3
    done >"$work/table"
fi

while read -r start size type; do
    loop=$(losetup --find --show --offset $((start * 512)) --sizelimit $((size * 512)) "$work/disk")
    if [ -z "$type" ]; then type=$(blkid -p -s TYPE -o value "$loop"); fi
    options=ro,nodev,nosuid,noexec
    if [ "$type" = xfs ]; then options=$options,nouuid; fi
    mkdir "$work/$start"
    volumes="$start:$loop $volumes"
    mount -t "$type" -o "$options" "$loop" "$work/$start" </dev/null
done <"$work/table"
echo mounted
read -r _ || :

trap - EXIT
take_away
