#!/usr/bin/env bash
# The walk of docs/deploy.md on one machine: a server and three clients, each in a network namespace of its own.
#
#   sudo FEDVEIL="$(command -v fedveil)" docs/deploy/three_machines.sh [--protection NAME] [--insecure] [--capture] DIR
#
# DIR: a new folder; every machine gets a folder in it, and they stay there to be looked at
# --protection: none, ckks (without the option), bfv or secagg
# --insecure: plain HTTP and no keys, to see what TLS hides
# --capture: DIR/capture.pcap gets all that passes the server's network interface (needs tcpdump)
#
# Processes and namespaces that it made are gone at the end, however that comes.
set -euo pipefail
umask 077

fail() { echo "three_machines.sh: $*" >&2; exit 1; }

protection=ckks insecure='' capture=''
while [[ ${1:-} == --* ]]; do
  case $1 in
    --protection) protection=${2:?--protection needs a name}; shift ;;
    --insecure) insecure=yes ;;
    --capture) capture=yes ;;
    *) fail "unknown option $1" ;;
  esac
  shift
done
[[ $# == 1 ]] || fail "name one folder, as in: three_machines.sh trial"
[[ $EUID == 0 ]] || fail "network namespaces need root"
[[ ! $insecure || $protection == none ]] || fail "--insecure uses no keys, so give it --protection none"
for tool in ip ${capture:+tcpdump}; do command -v "$tool" >/dev/null || fail "needs $tool"; done
FEDVEIL=$(command -v "${FEDVEIL:-fedveil}") || fail "there is no '${FEDVEIL:-fedveil}': name it as FEDVEIL=/path/to/fedveil"
mkdir "$1" && cd "$1" || fail "$1: must be a new folder"

export XDG_DATA_HOME=$PWD/data-home # of the clients' ledgers, which else lie in their users' data folders

clients=(client-1 client-2 client-3)
server=192.0.2.1 # of a block that no real network uses (RFC 5737)
net=fv$$
processes=()

clean_up() {
  for process in "${processes[@]}"; do kill -TERM "$process" 2>/dev/null || true; done # one may have ended
  for process in "${processes[@]}"; do wait "$process" || true; done
  for host in switch server "${clients[@]}"; do ip netns del "$net-$host" 2>/dev/null || true; done
}
trap clean_up EXIT
trap 'exit 130' INT TERM

fedveil() { "$FEDVEIL" "$@"; }
on() { (cd "$1" && exec ip netns exec "$net-$1" "${@:2}"); } # run a command on a machine, in its folder
show() { echo "$1\$ ${*:2}"; } # as a person on that machine would type it
walk() { show "$@"; on "$1" "$FEDVEIL" "${@:3}"; }
begin() { # FILE MACHINE fedveil ...: in the background
  show "${@:2}"
  (cd "$2" && exec ip netns exec "$net-$2" "$FEDVEIL" "${@:4}") >"$1" 2>&1 &
  processes+=($!)
}
until_true() { # SECONDS WHAT COMMAND...
  local end=$((SECONDS + $1)) what=$2
  until "${@:3}" 2>/dev/null; do
    if ((SECONDS > end)); then
      tail -n 20 ./*/output.txt >&2
      fail "waited in vain: $what"
    fi
    sleep 0.2
  done
}

echo '== machines'
ip netns add "$net-switch"
ip -n "$net-switch" link add switch type bridge
ip -n "$net-switch" link set switch up
number=0
for host in server "${clients[@]}"; do
  number=$((number + 1))
  mkdir "$host"
  ip netns add "$net-$host"
  ip link add "$host" netns "$net-switch" type veth peer name eth0 netns "$net-$host"
  ip -n "$net-switch" link set "$host" master switch up
  ip -n "$net-$host" address add "192.0.2.$number/24" dev eth0
  ip -n "$net-$host" link set eth0 up
  ip -n "$net-$host" link set lo up
  echo "$host  192.0.2.$number"
done

echo '== data: each client has its own messages (made up)'
names=(anastasia boniface chidiebere)
for k in 0 1 2; do
  {
    echo label,text
    for i in $(seq 24); do
      echo "ham,\"${names[k]} will be at the station at $i, see you there\""
      echo "ham,\"can ${names[k]} call me at home after lunch? it is about number $i\""
      echo "spam,\"WINNER $i: claim your free prize now, text $((8000 + i))\""
    done
  } >"client-$((k + 1))/messages.csv"
done
wc -l client-*/messages.csv

party=(--insecure)
if [[ ! $insecure ]]; then
  echo '== keys: made by the operator, and brought to each machine'
  mkdir operator
  echo "operator\$ fedveil keys new federation --host $server --clients 3 --set privacy.protection=$protection"
  (cd operator && fedveil keys new federation --host "$server" --clients 3 --set "privacy.protection=$protection")
  for host in server "${clients[@]}"; do cp -a "operator/federation/$host" "$host/keys"; done
  party=(--keys keys)
fi

if [[ $capture ]]; then
  ip netns exec "$net-server" tcpdump -i eth0 -s 0 -B 65536 -U -Z root -w capture.pcap >capture.txt 2>&1 &
  processes+=($!)
  until_true 20 'tcpdump listens' grep -q 'listening on' capture.txt
fi

echo '== the server, and the clients'
begin server/output.txt server fedveil server "${party[@]}" --state state
until_true 90 'the server started' grep -q '^state ' server/output.txt
cat server/output.txt
for k in 1 2 3; do
  begin "client-$k/output.txt" "client-$k" fedveil client --server "$server:9092" "${party[@]}" --data messages.csv ${insecure:+--number "$k"}
done
for host in "${clients[@]}"; do
  until_true 90 "$host joined" grep -q '^joined' "$host/output.txt"
  cat "$host/output.txt"
done

echo '== a run, stopped on its way'
settings=(--set data.clients=3 --set federation.cohort=3 --set federation.rounds=6 --set data.validation_fraction=0.25)
begin run.txt server fedveil submit spam-demo --on localhost "${settings[@]}" --set evaluation.federated=true
until_true 120 'the first round ended' grep -q '^round 1/' run.txt
run=$(basename server/state/runs/*)
walk server fedveil stop "$run"
ended=0
wait "${processes[-1]}" || ended=$?
unset 'processes[-1]'
cat run.txt
((ended == 130)) || fail "a run that was stopped ended with exit code $ended"
walk server fedveil status

echo '== and continued'
walk server fedveil resume "$run" --on localhost
show server "fedveil logs $run | tail -n 3"
on server "$FEDVEIL" logs "$run" | tail -n 3
show server ls "state/runs/$run"
ls "server/state/runs/$run"

if [[ $protection == ckks || $protection == bfv ]]; then
  echo '== a client opens the model, which the server cannot read'
  cp -R "server/state/runs/$run" client-1/record
  walk client-1 fedveil keys open record --keys keys --out model.safetensors
fi

echo '== the end'
for process in "${processes[@]}"; do kill -TERM "$process"; done
for process in "${processes[@]}"; do wait "$process" || fail "a process did not end as it should: $process"; done
processes=()
tail -n 1 server/output.txt client-*/output.txt
