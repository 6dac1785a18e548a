#!/usr/bin/env bash
# One-machine Slurm cluster without systemd: private munged + slurmctld + N slurmd (+ optional slurmdbd/mariadb).
#   slurm-cluster.sh install | start | stop | status | env | exec CMD... | kill-node N | start-node N
# Knobs (environment): SLURM_TEST_DIR, NODES, CPUS, MEM, GPUS, AUTH(munge|none), DBD(0|1: sacct), PYXIS(0|1: stand-in), PORT_BASE, PROCTRACK
# shellcheck disable=SC2016  # the single quotes keep inner shells' variables
set -euo pipefail
D=${SLURM_TEST_DIR:-/tmp/slurm-test}
NODES=${NODES:-4} CPUS=${CPUS:-8} MEM=${MEM:-8000} GPUS=${GPUS:-4} AUTH=${AUTH:-munge} DBD=${DBD:-0} PYXIS=${PYXIS:-0} PORT_BASE=${PORT_BASE:-26800}
PATH=$PATH:/usr/sbin:/sbin
export SLURM_CONF=$D/etc/slurm.conf

# proctrack/cgroup also ends daemonised (setsid) children, as real clusters do; linuxproc works everywhere
if [[ -z ${PROCTRACK:-} ]]; then PROCTRACK=linuxproc; [[ -w /sys/fs/cgroup/freezer/tasks ]] && PROCTRACK=cgroup; fi

die() { echo "slurm-cluster: $*" >&2; exit 1; }
# a zombie not yet reaped by PID 1 counts as gone
running() { local st; st=$(ps -o stat= -p "$1" 2>/dev/null) && [[ $st != Z* ]]; }
alive() { [[ -s $1 ]] && running "$(<"$1")"; }
wait_for() { local n=$1; shift; for ((i=0;i<n*10;i++)); do "$@" >/dev/null 2>&1 && return 0; sleep 0.1; done; return 1; }
bg() { # name cmd...   runs a daemon in its own session, pid in run/name.pid
  local name=$1; shift
  setsid nohup "$@" >"$D/log/$name.out" 2>&1 </dev/null &
  echo $! >"$D/run/$name.pid"
}

as_host() { # hostname cmd...   run cmd as that virtual host
  local h=$1; shift
  unshare --uts --mount --propagation private sh -c 'hostname "$1"; mount --bind "$2" /etc/hosts; shift 2; exec "$@"' sh "$h" "$D/etc/hosts" "$@"
}
bg_as() { local name=$1 h=$2; shift 2
  setsid nohup unshare --uts --mount --propagation private sh -c 'hostname "$1"; mount --bind "$2" /etc/hosts; shift 2; exec "$@"' \
    sh "$h" "$D/etc/hosts" "$@" >"$D/log/$name.out" 2>&1 </dev/null &
  echo $! >"$D/run/$name.pid"
}

write_conf() {
  umask 022
  mkdir -p "$D"/{etc,state,spool,log,run,dev}; chmod 755 "$D" "$D"/{etc,run}
  # every virtual node: own hostname (UTS namespace), own loopback address, private /etc/hosts (mount namespace)
  { echo "127.0.0.1 localhost"; echo "127.0.0.10 ctl"; for ((n=1;n<=NODES;n++)); do echo "127.0.0.$((10+n)) n$n"; done; } >"$D/etc/hosts"
  local auth=auth/none cred=cred/none authinfo=cred_expire=5
  if [[ $AUTH == munge ]]; then auth=auth/munge; cred=cred/munge; authinfo=socket=$D/run/munge.socket,cred_expire=5; fi
  local acct="AccountingStorageType=accounting_storage/none"
  [[ $DBD == 1 ]] && acct="AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.10
AccountingStoragePort=$((PORT_BASE+1))
AccountingStoragePass=$D/run/munge.socket
AccountingStorageTRES=gres/gpu"
  cat >"$SLURM_CONF" <<C
ClusterName=test
SlurmctldHost=ctl(127.0.0.10)
SlurmctldPort=$PORT_BASE
SlurmUser=root
SlurmdUser=root
AuthType=$auth
CredType=$cred
AuthInfo=$authinfo
StateSaveLocation=$D/state
SlurmdSpoolDir=$D/spool/%n
SlurmctldPidFile=$D/run/slurmctld.own.pid
SlurmdPidFile=$D/run/slurmd-%n.own.pid
SlurmctldLogFile=$D/log/slurmctld.log
SlurmdLogFile=$D/log/slurmd-%n.log
SlurmctldDebug=info
SlurmdDebug=info
MailProg=/bin/true
MpiDefault=none
ProctrackType=proctrack/$PROCTRACK
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=5
JobCompType=jobcomp/filetxt
JobCompLoc=$D/log/jobcomp.txt
$acct
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,sched_min_interval=100000,bf_interval=2,batch_sched_delay=0,defer_batch=no
ReturnToService=2
JobRequeue=1
KillWait=5
MinJobAge=7200
InactiveLimit=0
OverTimeLimit=0
SlurmctldTimeout=30
SlurmdTimeout=10
TCPTimeout=5
MessageTimeout=20
PropagateResourceLimitsExcept=MEMLOCK
GresTypes=gpu
NodeName=n[1-$NODES] NodeAddr=127.0.0.[11-$((10+NODES))] Port=[$((PORT_BASE+11))-$((PORT_BASE+10+NODES))] CPUs=$CPUS RealMemory=$MEM Gres=gpu:$GPUS State=UNKNOWN
PartitionName=batch Nodes=ALL Default=YES MaxTime=INFINITE DefaultTime=10 DefMemPerCPU=100 State=UP
C
  # Fake GPUs: char devices (clones of /dev/null); Slurm rejects regular files and takes CUDA_VISIBLE_DEVICES from the name's index
  for ((g=0;g<GPUS;g++)); do mknod "$D/dev/nvidia$g" c 1 3; done
  echo "NodeName=n[1-$NODES] Name=gpu File=$D/dev/nvidia[0-$((GPUS-1))]" >"$D/etc/gres.conf"
  echo "CgroupPlugin=cgroup/v1" >"$D/etc/cgroup.conf"
  if [[ $PYXIS == 1 ]]; then
    gcc -shared -fPIC -O1 -o "$D/etc/pyxis_stub.so" "$(dirname "$(readlink -f "$0")")/pyxis_stub.c"
    echo "required $D/etc/pyxis_stub.so" >"$D/etc/plugstack.conf"
  fi
}

start_dbd() { # mariadb (private data dir, loopback) + slurmdbd, so that sacct works
  local dbp=$((PORT_BASE+2))
  mkdir -p "$D/db"; 
  mariadb-install-db --no-defaults --user=root --datadir="$D/db" --auth-root-authentication-method=normal --skip-test-db >"$D/log/mariadb-install.log" 2>&1
  bg mariadbd mariadbd --no-defaults --user=root --datadir="$D/db" --socket="$D/run/mariadb.sock" --pid-file="$D/run/mariadbd.own.pid" \
    --bind-address=127.0.0.1 --port=$dbp --innodb-buffer-pool-size=64M --innodb-log-file-size=16M --innodb-flush-log-at-trx-commit=0 --innodb-lock-wait-timeout=900 --skip-log-bin
  wait_for 30 mariadb-admin --no-defaults -S "$D/run/mariadb.sock" ping || die "mariadbd did not come up"
  local pw; pw=$(head -c 16 /dev/urandom | od -An -tx1 | tr -d ' \n')
  mariadb --no-defaults -S "$D/run/mariadb.sock" -e "CREATE DATABASE slurm; CREATE USER 'slurm'@'%' IDENTIFIED BY '$pw'; CREATE USER 'slurm'@'localhost' IDENTIFIED BY '$pw'; GRANT ALL ON slurm.* TO 'slurm'@'%'; GRANT ALL ON slurm.* TO 'slurm'@'localhost';"
  cat >"$D/etc/slurmdbd.conf" <<C
AuthType=auth/munge
AuthInfo=socket=$D/run/munge.socket
DbdHost=ctl
DbdAddr=127.0.0.10
DbdPort=$((PORT_BASE+1))
SlurmUser=root
LogFile=$D/log/slurmdbd.log
PidFile=$D/run/slurmdbd.own.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort=$dbp
StorageUser=slurm
StoragePass=$pw
StorageLoc=slurm
CommitDelay=1
C
  chmod 600 "$D/etc/slurmdbd.conf"
  bg_as slurmdbd ctl slurmdbd -D
  wait_for 30 sacctmgr -n show cluster || { tail "$D/log/slurmdbd"*; die "slurmdbd did not come up"; }
}

start() {
  [[ -e $D/run/slurmctld.pid ]] && alive "$D/run/slurmctld.pid" && die "already running in $D"
  command -v slurmctld >/dev/null || die "slurmctld missing: run '$0 install'"
  rm -rf "$D"; write_conf
  if [[ $AUTH == munge ]]; then
    (umask 077; head -c 128 /dev/urandom >"$D/etc/munge.key")
    bg munged munged --foreground --key-file="$D/etc/munge.key" --socket="$D/run/munge.socket" \
      --pid-file="$D/run/munged.own.pid" --log-file="$D/log/munged.log" --seed-file="$D/etc/munge.seed" --num-threads=2
    wait_for 10 munge -S "$D/run/munge.socket" -n || { cat "$D/log/munged"*; die "munged did not come up"; }
  fi
  [[ $DBD == 1 ]] && start_dbd
  bg_as slurmctld ctl slurmctld -D -c -f "$SLURM_CONF"
  wait_for 10 scontrol ping || { tail -20 "$D"/log/slurmctld*; die "slurmctld did not come up"; }
  for ((n=1;n<=NODES;n++)); do start_node "$n"; done
  ready() { [[ $(sinfo -h -t idle -o %D) == "$NODES" ]]; }
  wait_for 30 ready || { sinfo -N -l; tail -5 "$D"/log/slurmd*; die "nodes did not become idle"; }
}

stop() {
  [[ -d $D/run ]] || return 0
  if [[ -e $D/run/slurmctld.pid ]] && alive "$D/run/slurmctld.pid"; then
    timeout 10 scancel --user=root --quiet 2>/dev/null || true
    drained() { [[ -z $(squeue -h) ]]; }
    wait_for 15 drained || echo "slurm-cluster: jobs still completing" >&2
  fi
  local f
  for f in "$D"/run/slurmd-n*.pid "$D/run/slurmctld.pid" "$D/run/slurmdbd.pid" "$D/run/mariadbd.pid" "$D/run/munged.pid"; do
    [[ $f == *.own.pid || ! -e $f ]] && continue
    local p; p=$(<"$f"); kill -TERM "$p" 2>/dev/null || true
    gone() { ! running "$p"; }
    wait_for 10 gone || kill -KILL "$p" 2>/dev/null || true
    rm -f "$f"
  done
  for ((n=1;n<=NODES;n++)); do [[ -d /sys/fs/cgroup/freezer/slurm_n$n ]] && find "/sys/fs/cgroup/freezer/slurm_n$n" -depth -type d -exec rmdir {} + 2>/dev/null; done; return 0
}
start_node() { mkdir -p "$D/spool/n$1"; bg_as "slurmd-n$1" "n$1" slurmd -D -N "n$1" -f "$SLURM_CONF"; }
# chaos: as if the power of node n went: slurmd, its stepds and everything they run (all processes in its UTS namespace)
kill_node() {
  local p ns q; p=$(<"$D/run/slurmd-n$1.pid"); ns=$(readlink "/proc/$p/ns/uts")
  [[ $ns != "$(readlink /proc/self/ns/uts)" ]] || die "node n$1 shares our namespace"
  for q in /proc/[0-9]*; do [[ $(readlink "$q/ns/uts" 2>/dev/null) == "$ns" ]] && kill -KILL "${q#/proc/}" 2>/dev/null; done; return 0
}

case ${1:-} in
  install) export DEBIAN_FRONTEND=noninteractive; apt-get update -qq && apt-get install -y -qq --no-install-recommends \
      slurm-wlm munge slurmdbd mariadb-server libslurm-dev gcc libc6-dev ;;
  start) start; echo "SLURM_CONF=$SLURM_CONF" ;;
  stop) stop ;;
  kill-node) kill_node "$2" ;;
  start-node) start_node "$2" ;;
  status) sinfo -N -l; squeue; scontrol ping ;;
  exec) shift; as_host ctl "$@" ;;
  env) echo "export SLURM_CONF=$SLURM_CONF" ;;
  *) die "usage: $0 install|start|stop|status|env" ;;
esac
