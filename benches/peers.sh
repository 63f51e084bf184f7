#!/usr/bin/env bash
# Measures Backhaul and other tools on the images of make-workload.sh; tools that are not installed are skipped.
#
#   peers.sh WORKLOAD_DIR OUT.tsv [PEER...]
#
# Phases: initial   backup of base.img into a fresh store in a local directory
#         nochange  backup of base.img again; the content is read and compared, as for a block
#                   device (stdin or forced reads: no mtime short cut)
#         scatter   backup of scatter.img after base.img
#         day1      backup of day1.img after base.img
#         restore   the latest backup into a new raw file, compared with day1.img
#         update    a copy of base.img made equal to day1.img in place (failback), compared
# Every run starts with inputs and store in the page cache and no dirty pages. cpu_s is user+sys of
# the tool and its children; other_cpu_s is what the rest of the machine used meanwhile (kernel
# write-back included): a run where it is large is suspect. MB/s is volume size / wall, 10^6 bytes.
# added_bytes is the growth of the store (apparent size); rss_mib is the peak of the largest process.
#
# Environment: SCRATCH  work folder (default WORKLOAD_DIR/scratch; emptied)
#              RUNS=3   runs a phase; no new run is begun once PHASE_S=40 seconds were measured
#              PHASES   the phases to run (default all; 'initial' always runs; restore and
#                       update need day1)
#              PEER_FILE  sourced: adds peers, MORE_PEERS=(NAME...). A peer is functions
#                       NAME_have, NAME_backup IMAGE, NAME_restore FILE and, where wanted,
#                       NAME_init and NAME_update FILE; FULL_ONLY+=(NAME) if it has no incremental
#                       backup. They run in $CUR, keep the store in $CUR/repo and anything else
#                       in $CUR/cache.
# For runs beside other work: hold a lock around the script, and where sched_autogroup is on, nice
# has no effect across sessions: echo -20 >/proc/self/autogroup first.
set -uo pipefail
[ $# -ge 2 ] || { sed -n '2,5p' "$0"; exit 2; }
W=$(cd "$1" && pwd); TSV=$2; shift 2
SCRATCH=${SCRATCH:-$W/scratch}; RUNS=${RUNS:-3}; PHASE_S=${PHASE_S:-40}
PHASES=${PHASES:-initial nochange scatter day1 restore update}
mkdir -p "$SCRATCH"; SCRATCH=$(cd "$SCRATCH" && pwd)
CUR=$SCRATCH/cur                                  # same path all along: some tools remember it
SIZE=$(stat -c %s "$W/base.img")
FULL_ONLY=(qemu_raw qemu_qcow2 nbdcopy zstd1)
PEERS=(backhaul zstd1 qemu_raw qemu_qcow2 nbdcopy rsync rdiff casync bita bupstash restic rustic borg borg_fixed benji)

# --- the peers: settings as documented for disk images, zstd where there is a choice -------------
# Backhaul, as `cargo build --release` leaves it. The receiver starts and stops inside each measured step, so that its
# time counts. A restore reads back through the cache; BACKHAUL_VERIFY=device reads back from the device.
export BACKHAUL_BIN=${BACKHAUL_BIN:-$(cd "$(dirname "$0")/.." && pwd)/target/release}
export BACKHAUL_VERIFY=${BACKHAUL_VERIFY:-cached}
export BACKHAUL_STORE=file://$CUR/repo/store BACKHAUL_RECEIVER_STATE=$CUR/cache/receiver BACKHAUL_AGENT_STATE=$CUR/cache/agent
export BACKHAUL_LISTEN=${BACKHAUL_LISTEN:-127.0.0.1:47433}
backhaul_have() { [ -x "$BACKHAUL_BIN/backhaul-agent" ] && [ -x "$BACKHAUL_BIN/backhaul-receiver" ]; }
backhaul_serving() { # backhaul_serving COMMAND...: runs it beside a receiver
  local pid rc=0
  exec 9< <(exec "$BACKHAUL_BIN/backhaul-receiver" serve -q); pid=$!
  read -r -u 9 _ || return 1
  "$@" || rc=$?
  kill "$pid"; wait "$pid" || rc=1
  exec 9<&-
  return $rc
}
backhaul_init() {
  "$BACKHAUL_BIN/backhaul-receiver" init
  "$BACKHAUL_BIN/backhaul-receiver" token --group bench --address "$BACKHAUL_LISTEN" >token
  backhaul_serving "$BACKHAUL_BIN/backhaul-agent" join --token-file token
}
backhaul_backup() {
  "$BACKHAUL_BIN/backhaul-agent" protect "disk=$1"
  backhaul_serving "$BACKHAUL_BIN/backhaul-agent" sync
}
backhaul_restore() { "$BACKHAUL_BIN/backhaul-receiver" restore bench/disk --to "$1" --verify "$BACKHAUL_VERIFY"; }
backhaul_update() { backhaul_restore "$1"; }

next() { echo "$(date +%s%N)" | tee "$CUR/last"; }        # a name for a new backup
last() { cat "$CUR/last"; }
have() { command -v "$1" >/dev/null; }

zstd1_have() { have zstd; }
zstd1_backup() { zstd -1 -T2 -q -c "$1" | cat >"repo/$(next)"; }
zstd1_restore() { zstd -dqf "repo/$(last)" -o "$1"; }

qemu_raw_have() { have qemu-img; }
qemu_raw_backup() { qemu-img convert -f raw -O raw "$1" "repo/$(next)"; }
qemu_raw_restore() { qemu-img convert -f raw -O raw "repo/$(last)" "$1"; }

qemu_qcow2_have() { have qemu-img; }
qemu_qcow2_backup() { qemu-img convert -m 2 -W -c -f raw -O qcow2 -o compression_type=zstd "$1" "repo/$(next)"; }
qemu_qcow2_restore() { qemu-img convert -f qcow2 -O raw "repo/$(last)" "$1"; }

nbdcopy_have() { have nbdcopy && have nbdkit; }
nbdcopy_backup() { nbdcopy -- [ nbdkit --exit-with-parent file "$1" ] "repo/$(next)"; }
nbdcopy_restore() { nbdcopy -- [ nbdkit --exit-with-parent file "repo/$(last)" ] "$1"; }

# the far side runs behind a pipe, as over ssh, so that the delta algorithm runs and is measured
rsync_have() { have rsync; }
rsync_init() { printf '#!/bin/sh\nshift\nexec sh -c "$*"\n' >rsh; chmod +x rsh; }
rsync_send() { rsync -e "$CUR/rsh" --ignore-times --inplace --no-whole-file "$@"; }
rsync_backup() { rsync_send "$1" "far:$CUR/repo/disk.img"; }
rsync_restore() { rsync_send "far:$CUR/repo/disk.img" "$1"; }
rsync_update() { rsync_restore "$1"; }

rdiff_have() { have rdiff; }
rdiff_backup() {
  if [ -e repo/base ]; then rdiff delta repo/base.sig "$1" "repo/$(next)"
  else cp --sparse=never "$1" repo/base && rdiff signature repo/base repo/base.sig; fi
}
rdiff_restore() { rdiff patch repo/base "repo/$(last)" "$1"; }

casync_have() { have casync; }
casync_backup() { casync make --store=repo/default.castr "repo/$(next).caibx" "$1"; }
casync_restore() { casync extract --store=repo/default.castr "repo/$(last).caibx" "$1"; }
casync_update() { # onto a block device, where the output is its own seed (onto a file: "Stale file handle")
  local d rc=0; d=$(losetup -f --show "$1")
  casync extract --store=repo/default.castr "repo/$(last).caibx" "$d" || rc=1
  losetup -d "$d"; return $rc
}

bita_have() { have bita; }
bita_backup() { bita compress --compression zstd --compression-level 1 -i "$1" "repo/$(next)"; }
bita_restore() { bita clone "repo/$(last)" "$1"; }
bita_update() { bita clone --seed-output "repo/$(last)" "$1"; }

export BUPSTASH_REPOSITORY=$CUR/repo/b BUPSTASH_KEY=$CUR/cache/key BUPSTASH_QUERY_CACHE=$CUR/cache/query
bupstash_have() { have bupstash; }
bupstash_init() { bupstash new-key -o "$BUPSTASH_KEY" && bupstash init; }
bupstash_backup() { bupstash put --no-progress --send-log "$CUR/cache/send" name=disk.img - <"$1" >last; }
bupstash_restore() { bupstash get --no-progress "id=$(last)" >"$1"; }

export RESTIC_REPOSITORY=$CUR/repo RESTIC_PASSWORD=bench RESTIC_CACHE_DIR=$CUR/cache
restic_have() { have restic; }
restic_init() { restic init -q; }
restic_backup() { restic backup -q --stdin --stdin-filename disk.img <"$1"; }
restic_restore() { restic restore -q latest --target "$(dirname "$1")"; }

export RUSTIC_REPOSITORY=$CUR/repo RUSTIC_PASSWORD=bench RUSTIC_CACHE_DIR=$CUR/cache RUSTIC_NO_PROGRESS=true
rustic_have() { have rustic; }
rustic_init() { rustic init; }
rustic_backup() { rustic backup --force --stdin-filename disk.img - <"$1"; }   # without --force 0.11 takes any later stdin for unchanged
rustic_restore() { rustic restore latest:/disk.img "$1"; }
rustic_update() { rustic restore --verify-existing latest:/disk.img "$1"; }

export BORG_REPO=$CUR/repo BORG_PASSPHRASE=bench BORG_BASE_DIR=$CUR/cache BORG_RELOCATED_REPO_ACCESS_IS_OK=yes
borg_have() { have borg; }
borg_init() { borg init -e repokey-blake2; }
borg_backup() { borg create -C zstd,1 --stdin-name disk.img "::$(next)" - <"$1"; }
borg_restore() { (cd "$(dirname "$1")" && borg extract "::$(last)"); }
borg_fixed_have() { have borg; }                  # the chunker borg's manual advises for disks
borg_fixed_init() { borg_init; }
borg_fixed_backup() { borg create -C zstd,1 --chunker-params fixed,4194304 --stdin-name disk.img "::$(next)" - <"$1"; }
borg_fixed_restore() { borg_restore "$1"; }

benji_have() { have benji; }
benji_init() {
  cat >benji.yaml <<YAML
configurationVersion: '1'
databaseEngine: sqlite:///$CUR/repo/benji.sqlite
defaultStorage: s
storages:
  - {name: s, storageId: 1, module: file, configuration: {path: $CUR/repo/data, activeTransforms: [z]}}
transforms:
  - {name: z, module: zstd, configuration: {level: 1}}
ios:
  - {name: file, module: file}
YAML
  mkdir repo/data && benji -c benji.yaml database-init
}
benji_backup() { next >/dev/null; benji -c benji.yaml --log-level ERROR backup -u "v$(last)" "file:$1" disk; }
benji_restore() { benji -c benji.yaml --log-level ERROR restore "v$(last)" "file:$1"; }

[ -z "${PEER_FILE:-}" ] || { . "$PEER_FILE"; PEERS+=("${MORE_PEERS[@]}"); }
[ $# -eq 0 ] || PEERS=("$@")

# --- measuring ------------------------------------------------------------------------------------
busy() { awk '/^cpu /{print $2+$3+$4+$7+$8+$9}' /proc/stat; }       # ticks of 1/100 s
store() { du -sb "$CUR/repo" | cut -f1; }
reset() { rm -rf "$CUR"; cp -a "$SCRATCH/keep" "$CUR"; }            # the store as after 'initial'
warm() { find "$@" -type f -exec cat {} + >/dev/null 2>&1; }

run() { # run PEER PHASE N IMAGE FUNCTION ARG: one measured run, one line of OUT.tsv
  local peer=$1 phase=$2 n=$3 input=$4 fn=$5 arg=$6 before b0 b1 rc ok=ok wall user sys rss
  before=$(store)
  sync; warm "$input" "$CUR"; b0=$(busy)
  (cd "$CUR" && exec /usr/bin/time -q -o "$SCRATCH/time" -f '%e %U %S %M' \
    bash -eo pipefail -c '"$@"' _ "$fn" "$arg" >"$SCRATCH/log" 2>&1); rc=$?
  b1=$(busy)
  read -r wall user sys rss < <(tail -1 "$SCRATCH/time")
  [ $rc -eq 0 ] || { ok=failed; sed 's/^/    /' "$SCRATCH/log" | tail -5 >&2; }
  case $phase in restore | update) cmp -s "$arg" "$W/day1.img" || ok=wrong ;; esac
  awk -v OFS='\t' -v w="$wall" -v c="$user $sys" -v r="$rss" -v z="$SIZE" -v b="$((b1 - b0))" \
    -v p="$peer" -v ph="$phase" -v n="$n" -v a="$(($(store) - before))" -v ok="$ok" \
    'BEGIN{split(c,t," "); cpu=t[1]+t[2]; o=b/100-cpu; print p,ph,n,w,cpu,int(r/1024),int(z/1e6/w),a,sprintf("%.1f",o<0?0:o),ok}' |
    tee -a "$TSV" >&2
  WALL=$wall; [ $ok = ok ]
}

phase() { # phase PEER PHASE: its runs, with what has to be put back before each
  local peer=$1 phase=$2 n spent=0 out=$SCRATCH/out/disk.img
  case " $PHASES initial " in *" $phase "*) ;; *) return 0 ;; esac
  for ((n = 1; n <= RUNS; n++)); do
    awk -v s="$spent" -v m="$PHASE_S" 'BEGIN{exit !(s<m)}' || break
    rm -rf "$SCRATCH/out"; mkdir "$SCRATCH/out"
    case $phase in
      initial) rm -rf "$CUR"; mkdir -p "$CUR/repo" "$CUR/cache"
        ! declare -F "${peer}_init" >/dev/null || (cd "$CUR" && "${peer}_init" >"$SCRATCH/log" 2>&1) || { cat "$SCRATCH/log" >&2; return 1; }
        run "$peer" "$phase" $n "$W/base.img" "${peer}_backup" "$W/base.img" || return 1 ;;
      nochange) run "$peer" "$phase" $n "$W/base.img" "${peer}_backup" "$W/base.img" || return 1 ;;
      scatter | day1) reset
        run "$peer" "$phase" $n "$W/$phase.img" "${peer}_backup" "$W/$phase.img" || return 1 ;;
      restore) run "$peer" "$phase" $n "$CUR" "${peer}_restore" "$out" || return 1 ;;
      update) cp --sparse=never "$W/base.img" "$out"
        run "$peer" "$phase" $n "$out" "${peer}_update" "$out" || return 1 ;;
    esac
    spent=$(awk -v a="$spent" -v b="$WALL" 'BEGIN{print a+b}')
  done
}

export CUR W; export -f $(compgen -A function)
[ -s "$TSV" ] || printf 'peer\tphase\trun\twall_s\tcpu_s\trss_mib\tMB_s\tadded_bytes\tother_cpu_s\tok\n' >"$TSV"
for p in "${PEERS[@]}"; do
  "${p}_have" || { echo "skip $p: not installed" >&2; continue; }
  if phase "$p" initial; then
    rm -rf "$SCRATCH/keep"; cp -a "$CUR" "$SCRATCH/keep"
    case " ${FULL_ONLY[*]} " in *" $p "*) ;; *) phase "$p" nochange; phase "$p" scatter ;; esac
    phase "$p" day1 && phase "$p" restore
    ! declare -F "${p}_update" >/dev/null || phase "$p" update
  fi
  rm -rf "$CUR" "$SCRATCH/keep" "$SCRATCH/out"
done

python3 - "$TSV" <<'PYEOF'
import csv, statistics as st, sys
rows = {}
for r in csv.DictReader(open(sys.argv[1]), delimiter='\t'): rows.setdefault((r['phase'], r['peer']), []).append(r)
for phase in 'initial nochange scatter day1 restore update'.split():
    print(f'\n{phase:12} {"wall s":>8} {"MB/s":>7} {"cpu s":>7} {"rss MiB":>8} {"added MiB":>10} {"other cpu":>9} {"runs":>4}')
    med = []
    for (ph, peer), rs in rows.items():
        if ph != phase: continue
        m = lambda k: st.median(float(r[k]) for r in rs)
        bad = '' if all(r['ok'] == 'ok' for r in rs) else '  ' + '/'.join(r['ok'] for r in rs)
        med.append((m('wall_s'), f'{peer:12} {m("wall_s"):8.2f} {m("MB_s"):7.0f} {m("cpu_s"):7.2f} {m("rss_mib"):8.0f} {m("added_bytes") / 2**20:10.2f} {m("other_cpu_s"):9.1f} {len(rs):4}{bad}'))
    for _, line in sorted(med): print(line)
PYEOF
