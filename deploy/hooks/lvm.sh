#!/bin/sh
# A snapshot of each logical volume is read in its place. In agent.toml:
#
#   snapshot = "hooks"
#   [hooks]
#   pre  = "/etc/backhaul/lvm.sh"
#   post = "/etc/backhaul/lvm.sh"
#
# The service must be let: backhaul-agent-hooks.conf.
#
# Each snapshot is of one instant (LVM freezes a mounted file system while it makes one), and several are made one after
# the other: with several volumes their points are `fuzzy`, unless you know better and say hooks.claims = "crash".
#
# Not run by the project's tests, whose kernel has no device-mapper. Try it by hand first:
#   BACKHAUL_HOOK=pre BACKHAUL_VOLUMES=data BACKHAUL_PATH_DATA=/dev/vg/data sh lvm.sh
set -eu

# Room for what is written while the snapshot is read. Where it is too small the snapshot becomes invalid, reading it
# fails, and no point is made; the volume itself is not harmed. Of thin volumes leave --size out.
SIZE=${SIZE:-10%ORIGIN}
MARK=backhaul-snapshot

# Also in `pre`: what is there belongs to nobody any more.
remove_all() {
    lvs --noheadings --options lv_full_name "@$MARK" | while read -r snapshot; do
        # udev may look at it for a moment.
        for try in 1 2 3 4 5; do
            lvremove --yes --quiet "$snapshot" >&2 && break
            [ "$try" = 5 ] && exit 1
            sleep 1
        done
    done
}

remove_all
[ "$BACKHAUL_HOOK" = pre ] || exit 0

for name in $BACKHAUL_VOLUMES; do
    variable=BACKHAUL_PATH_$(printf %s "$name" | tr 'a-z-' 'A-Z_')
    path=$(printenv "$variable")
    # What is no logical volume is read as it is, and must hold still.
    lv=$(lvs --noheadings --options lv_full_name "$path" 2>/dev/null | tr -d ' ') || continue
    snapshot=backhaul-$name
    # On standard error: only NAME=PATH may be printed on standard output.
    lvcreate --quiet --snapshot --permission r --extents "$SIZE" --addtag "$MARK" --name "$snapshot" "$lv" >&2
    echo "$name=/dev/${lv%%/*}/$snapshot"
done
