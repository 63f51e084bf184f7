#!/bin/sh
# PostgreSQL on a volume whose snapshot is read (lvm.sh does that): makes recovery after a restore short. In agent.toml:
#
#   snapshot = "hooks"
#   [hooks]
#   pre  = "/etc/backhaul/postgresql.sh && /etc/backhaul/lvm.sh"
#   post = "/etc/backhaul/lvm.sh"
#
# Why not pg_backup_start and pg_backup_stop: they are for copies of a data folder that are made file by file while the
# server writes, so that the copy is of no instant and only the WAL puts it right. A point labelled `crash` is one
# instant of the whole disk, as after a power cut, and PostgreSQL recovers from that by itself, always, from the WAL in
# the data folder. All of it must be of that instant: data folder, pg_wal and tablespaces on one volume, or on several
# whose snapshots are. The two functions would also want one session that stays open from pre to post, and label and
# tablespace map that pg_backup_stop returns would have to be put into the copy after it was made.
#
# What is worth doing is a CHECKPOINT: what was committed before it needs no recovery. That is all this does, and where
# it fails the point is as good, and recovery longer. fsync and full_page_writes must be on, as they are by default.
#
# Claim hooks.claims = "application" only if that is what you call a database that recovers in seconds; `crash` is what
# this is.
#
# Not run by the project's tests.
set -u

# Bounded: a checkpoint writes everything that is dirty.
timeout 40 runuser -u postgres -- psql --no-psqlrc --quiet --dbname postgres --command CHECKPOINT >&2 ||
    echo "no CHECKPOINT: recovery after a restore will take longer" >&2
exit 0
