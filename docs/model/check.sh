#!/usr/bin/env bash
# Checks switching.pml and resuming.pml with Spin: that nothing goes wrong where nothing should, and that
# something does where a rule is broken or a hole is known. README.md has the results.
#
#   check.sh            everything but the long searches: some minutes on two cores
#   check.sh quick      only what takes seconds
#   check.sh all        everything; one search takes 1.4 GB
#   check.sh NAME...    those configurations
#   check.sh trail NAME the shortest way to the error of a configuration, step by step
#   check.sh assertions takes each assertion out in turn, and wants that noticed; so do
#                       the runs without arguments, and with all
#
# It needs spin, gcc, and 2 GB of memory (3 for all), and writes only to a temporary
# directory. It fails when a verdict is not the expected one. JOBS is how many searches
# run at once.
set -eu

here=$(cd "$(dirname "$0")" && pwd)

# A line for each configuration, of resuming.pml where its name begins with resume: its name; when it runs (q: also in quick, n: normally,
# l: only in all); how it is searched (dfs: all states; bfs: until the first error, which
# is then the nearest; ltl: all runs); the verdict that is expected; the definitions.
#
# A verdict is "no error", or what switching.pml says behind VIOLATED or REACHED.
truncated='EOF before all that was written'
lost='a stream was lost although nothing had failed'
order='a byte was lost, doubled or out of order'
denied='denied for good without a reason'
unheard='one has failed, and the other cannot tell'
stuck='a peer is stuck'
less='less received than was confirmed'
abandoned='a stream was lost although nobody gave up'
unsent='what was written before Close was lost'
untold='one has given up, and the other is not told'
apart='the two do not come together'
quiet='-DNEW_FAILS=0 -DOLD_FAILS=0'
both='-DINIT_B=1 -DMIGRATIONS=2'
ours='-DCHECK_DRAFT=0 -DCLOSE_READ=1'

configurations() {
	cat <<-END
	# Two peers with the verified handover. Everything may fail, unless it says otherwise.
	one|q|dfs|no error|-DK=2
	one-3-bytes|n|dfs|no error|-DK=3
	one-close-reset|n|dfs|no error|-DK=2 -DCLOSE_READ=1 -DRESETS=1
	two-attempts|n|dfs|no error|-DK=2 -DMIGRATIONS=2
	both-migrate|n|dfs|no error|-DK=1 $both -DCLOSE_READ=1
	both-migrate-resets|n|dfs|no error|-DK=1 $both -DRESETS=1
	both-migrate-2-bytes|l|dfs|no error|-DK=2 $both
	three-attempts|n|dfs|no error|-DK=1 -DMIGRATIONS=3
	both-nothing-fails|q|dfs|no error|-DK=2 -DINIT_B=1 -DMIGRATIONS=3 $quiet
	causes|q|dfs|no error|-DK=1 -DMIGRATIONS=2 -DOLD_LIES=0 -DCAUSES=1
	every-run-ends|q|ltl|no error|-DK=1 -DENDS -DCLOSE_READ=1
	both-every-run-ends|n|ltl|no error|-DK=1 -DENDS $both

	# One of them has only the draft.
	draft-responder|n|dfs|no error|-DK=2 -DDRAFT_B=1 -DMIGRATIONS=2 -DOLD_LIES=0 -DCLOSE_READ=1 -DRESETS=1
	draft-responder-again|n|dfs|no error|-DK=1 -DDRAFT_B=1 -DMIGRATIONS=3 -DOLD_LIES=0
	draft-responder-ours|n|dfs|no error|-DK=1 -DDRAFT_B=1 $both $ours -DRESETS=1
	draft-initiator-ours|n|dfs|no error|-DK=1 -DDRAFT_A=1 $both $ours
	draft-initiator-holds-ours|n|dfs|no error|-DK=1 -DDRAFT_A=1 -DDRAFT_HOLDS=1 $both $ours
	draft-initiator-holds|q|dfs|no error|-DK=2 -DDRAFT_A=1 -DDRAFT_HOLDS=1 -DMIGRATIONS=2 -DNEW_FAILS=0 -DOLD_LIES=0

	draft-a-nothing-fails|q|dfs|no error|-DK=2 -DDRAFT_A=1 -DDRAFT_HOLDS=1 $both -DCLOSE_READ=1 $quiet
	draft-b-nothing-fails|q|dfs|no error|-DK=2 -DDRAFT_B=1 -DDRAFT_HOLDS=1 $both -DCLOSE_READ=1 $quiet

	# A rule is broken.
	no-S1|q|bfs|$truncated|-DNO_S1 $quiet
	no-S2|q|bfs|$order|-DNO_S2 $quiet
	no-S3|q|bfs|$truncated|-DNO_S3 -DOLD_FAILS=0
	no-S4|q|bfs|$truncated|-DNO_S4 $quiet
	no-S5|q|bfs|$truncated|-DNO_S5 -DNEW_FAILS=0
	no-S5-draft|q|bfs|$truncated|-DNO_S5 -DDRAFT_B=1 $quiet
	no-S5-exception|q|bfs|$truncated|-DNO_S5_EXCEPTION -DDRAFT_B=1 -DOLD_FAILS=0
	no-S6|q|bfs|$stuck|-DNO_S6 $quiet
	no-S10-initiator|q|bfs|$lost|-DNO_S10_INITIATOR $quiet
	no-S10-responder|q|bfs|$truncated|-DNO_S10_RESPONDER $quiet
	no-S12|q|bfs|$truncated|-DNO_S12 -DNEW_FAILS=0
	no-S12-proof|q|bfs|$truncated|-DNO_S12_PROOF -DDRAFT_A=1 -DPROOF_ON_NEW=1 -DOLD_FAILS=0
	no-M1|q|bfs|$stuck|-DNO_M1 $both -DDENIALS=0 $quiet
	no-M1-denial|q|bfs|$lost|-DNO_M1_DENIAL $both $quiet
	no-M1-proof|q|bfs|$lost|-DNO_M1_PROOF -DDRAFT_A=1 -DDRAFT_HOLDS=1 $both -DCLOSE_READ=1 $quiet
	no-M1-held|q|bfs|$lost|-DNO_M1_HELD -DDRAFT_A=1 -DDRAFT_HOLDS=1 $both $quiet
	no-M1-same|q|bfs|$denied|-DNO_M1_SAME -DDRAFT_A=1 -DDRAFT_HOLDS=1 $both $quiet
	no-M2|q|bfs|$denied|-DNO_M2 -DMIGRATIONS=2 $quiet

	# When both migrate at once and the attempt that goes first fails, this remains.
	hole-meeting|q|bfs|$lost|$both -DDENIALS=0 -DCAUSES=1 -DOLD_FAILS=0

	# With a peer that has only the draft this is known to remain, on that peer's side.
	hole-draft-initiator|q|bfs|$truncated|-DDRAFT_A=1 $quiet
	hole-draft-initiator-holds|q|bfs|$truncated|-DDRAFT_A=1 -DDRAFT_HOLDS=1 -DOLD_FAILS=0
	hole-draft-initiator-old-lies|q|bfs|$truncated|-DDRAFT_A=1 -DPROOF_ON_NEW=1 -DNEW_FAILS=0
	hole-draft-responder-old-lies|q|bfs|$truncated|-DDRAFT_B=1 -DNEW_FAILS=0

	# And this, with nothing failing: the application sees an error.
	hole-doubt|q|bfs|$lost|-DDRAFT_B=1 -DMIGRATIONS=2 -DDOUBT_EXCUSED=0 $quiet

	# A rule that would close the two of hole-draft-initiator, and its price: see README.md.
	proof-on-new|n|dfs|no error|-DK=1 -DDRAFT_A=1 $both -DOLD_LIES=0 -DPROOF_ON_NEW=1 -DCLOSE_READ=1
	proof-on-new-holds|n|dfs|no error|-DK=2 -DDRAFT_A=1 -DDRAFT_HOLDS=1 -DMIGRATIONS=2 -DOLD_LIES=0 -DPROOF_ON_NEW=1

	# Bugs that show in the outcome alone.
	bug-half|q|bfs|reads from one stream and writes to another|-DBUG_HALF $quiet
	bug-stays|q|bfs|one is on the old stream, one on the new|-DBUG_STAYS $quiet
	bug-deaf|q|bfs|$unheard|-DBUG_DEAF -DRESETS=1 $quiet

	# The model does something: what should be possible is.
	reach-survival|q|bfs|the stream outlives its old connection|-DREACH=1
	reach-second-attempt|q|bfs|the second attempt succeeds|-DREACH=2 -DMIGRATIONS=2 -DOLD_FAILS=0
	reach-both|q|bfs|one of two attempts at once succeeds|-DREACH=3 $both $quiet
	reach-draft-initiator|q|bfs|the migration succeeds|-DREACH=4 -DDRAFT_A=1 -DDRAFT_HOLDS=1 $quiet
	reach-draft-responder|q|bfs|the migration succeeds|-DREACH=4 -DDRAFT_B=1 $quiet

	# A stream that outlives its connections.
	resume|q|dfs|no error|-DFAULTS=2
	resume-lies|n|dfs|no error|-DFAULTS=2 -DLIES=1 -DCLOSES=1 -DTIMEOUTS=1 -DSILENT=1
	resume-resets|q|dfs|no error|-DFAULTS=1 -DLIES=1 -DCLOSES=1 -DTIMEOUTS=1 -DSILENT=1 -DRESETS=1 -DPATIENCE_ENDS=1
	resume-purpose|q|dfs|no error|-DFAULTS=1 -DPURPOSE=1 -DRESETS=1 -DCLOSES=1 -DPATIENCE_ENDS=1 -DTIMEOUTS=1
	resume-restarts|q|dfs|no error|-DFAULTS=1 -DRESTARTS=1 -DCLOSES=1 -DTIMEOUTS=1
	resume-codeless|q|dfs|no error|-DFAULTS=1 -DCODELESS=1 -DRESETS=1 -DCLOSES=1 -DPATIENCE_ENDS=1 -DTIMEOUTS=1 -DSILENT=1
	resume-close-read|l|dfs|no error|-DFAULTS=2 -DCLOSE_READ=1 -DCLOSES=1 -DTIMEOUTS=1
	resume-races|n|dfs|no error|-DFAULTS=2 -DLIES=1 -DRACES=1 -DTOLD=2 -DCLOSES=1
	resume-told|q|dfs|no error|-DFAULTS=1 -DLIES=1 -DTOLD=1 -DCLOSES=1 -DTIMEOUTS=1
	resume-short-ring|q|dfs|no error|-DKA=2 -DKB=1 -DRING=1 -DFAULTS=2 -DTIMEOUTS=1
	resume-only-a|q|dfs|no error|-DOPENS_B=0 -DFAULTS=2 -DTIMEOUTS=1 -DLIES=1 -DCLOSES=1
	resume-only-b|q|dfs|no error|-DOPENS_A=0 -DFAULTS=2 -DTIMEOUTS=1 -DLIES=1 -DCLOSES=1
	resume-and-migrate|n|dfs|no error|-DFAULTS=1 -DMIGRATIONS=1 -DLIES=1 -DCLOSES=1
	resume-and-migrate-resets|n|dfs|no error|-DKB=0 -DFAULTS=1 -DMIGRATIONS=1 -DRESETS=1 -DPATIENCE_ENDS=1 -DTIMEOUTS=1 -DSILENT=1

	# A rule of resumption is broken.
	resume-no-epochs|q|bfs|$less|-DNO_EPOCHS -DFAULTS=2
	resume-no-stale|q|bfs|$less|-DNO_STALE -DFAULTS=2 -DSILENT=1
	resume-no-freeze|q|bfs|$less|-DNO_FREEZE -DFAULTS=1 -DSILENT=1
	resume-no-ring|q|bfs|$abandoned|-DNO_RING -DFAULTS=2
	resume-no-offsets|q|bfs|$order|-DNO_OFFSETS -DFAULTS=1
	resume-no-end-again|q|bfs|$apart|-DNO_END_AGAIN -DFAULTS=1
	resume-no-end-confirmed|q|bfs|$unsent|-DNO_END_CONFIRMED -DFAULTS=2 -DCLOSES=1
	resume-no-tombstone|q|bfs|$unsent|-DNO_TOMBSTONE -DFAULTS=1 -DCLOSES=1
	resume-no-wait|q|bfs|attempts without end|-DNO_WAIT -DKA=0 -DFAULTS=2 -DMAX_EPOCH=9
	resume-no-max|q|bfs|$abandoned|-DNO_MAX -DFAULTS=2 -DCLOSE_READ=1
	resume-no-code|q|bfs|$abandoned|-DNO_CODE -DFAULTS=1 -DSILENT=1
	resume-no-final-reset|q|bfs|$untold|-DNO_FINAL_RESET -DFAULTS=1 -DPATIENCE_ENDS=1 -DTIMEOUTS=1 -DSILENT=1
	resume-believes|q|bfs|$truncated|-DBELIEVES -DFAULTS=1 -DLIES=1
	resume-believes-open|q|bfs|$truncated|-DFAULTS=1 -DRACES=1 -DTOLD=1
	resume-ends-early|q|bfs|$truncated|-DENDS_EARLY -DFAULTS=1 -DMIGRATIONS=1
	resume-ignores-reset|q|bfs|$untold|-DIGNORES_RESET -DKB=0 -DFAULTS=1 -DMIGRATIONS=1 -DRESETS=1

	# And that does something, too.
	resume-reach-once|q|bfs|the stream outlives its connections|-DREACH=1 -DFAULTS=1
	resume-reach-twice|n|bfs|the stream outlives its connections|-DREACH=2 -DFAULTS=2
	END
}

# model NAME says which file a configuration is of; without, where it has been changed.
model() {
	case $1 in
	resume*) echo "${without:-$here}/resuming.pml" ;;
	*) echo "${without:-$here}/switching.pml" ;;
	esac
}

fail() {
	echo "check.sh: $*" >&2
	exit 1
}

# field NAME N prints the Nth field of a configuration.
field() {
	configurations | awk -F'|' -v name="$1" -v n="$2" '$1 == name { print $n }'
}

# prepare NAME DIR builds the search of a configuration in DIR.
prepare() {
	local when how flags opts unmerged=
	when=$(field "$1" 2) how=$(field "$1" 3) flags=$(field "$1" 5)
	# Steps that begin with enabled() cannot be replayed once they are merged with the next.
	case $1 in resume*) unmerged=-o3 ;; esac
	case $1$flags in resume* | *-DK=*) ;; *) flags="-DK=1 $flags" ;; esac
	echo "$flags" >"$2/flags"
	cp "$(model "$1")" "$2/model.pml"
	cd "$2"
	# No state is left out: neither by partial order reduction nor by hashing.
	case $how in
	dfs) opts='-O1 -DSAFETY' ;;
	bfs) opts='-O0 -DSAFETY -DBFS' ;; # compiling takes longer than searching
	ltl) opts='-O1' ;;
	esac
	[ "$when" != l ] || opts="$opts -DCOLLAPSE" # half the memory, a third more time
	# shellcheck disable=SC2086 # flags and options are words
	spin $unmerged $flags -a model.pml >spin.out 2>&1 || { cat spin.out >&2; fail "$1: spin does not take the model"; }
	# shellcheck disable=SC2086
	gcc -w -DNOREDUCE -DMEMLIM=3800 $opts -o pan pan.c || fail "$1: gcc does not take what spin made of the model"
}

# search DIR HOW runs the search. It leaves what pan says in pan.out, and the seconds of
# processor time that it took in pan.time.
search() {
	local claim='' TIMEFORMAT='%U'
	[ "$2" = ltl ] && claim=-a
	# What it found counts, not its status.
	{ time (cd "$1" && ./pan -m10000 $claim >pan.out 2>pan.err) || true; } 2>"$1/pan.time"
}

# verdict DIR HOW says what a search has found.
verdict() {
	local out=$1/pan.out
	if grep -qE 'max search depth too small|out of memory|reached -?DMEMLIM|aborting|hash table .*full|truncat' "$out" "$1/pan.err"; then
		echo "not exhaustive"
	elif [ -e "$1/model.pml.trail" ]; then
		local line
		# shellcheck disable=SC2046 # flags are words
		line=$(cd "$1" && spin $(cat flags) -t model.pml 2>&1 | sed -n 's/.*model.pml:\([0-9]*\), Error: assertion.*/\1/p' | head -1)
		if [ -n "$line" ]; then
			sed -n "${line}s/.*\(VIOLATED\|REACHED\): \(.*\) \*\/.*/\2/p" "$1/model.pml"
		elif grep -q 'invalid end state' "$out"; then
			echo "$stuck"
		elif grep -q 'acceptance cycle' "$out"; then
			echo "a run does not end"
		else
			echo "the model is faulty: $(head -1 "$out")"
		fi
	elif [ "$2" != bfs ] && ! grep -q '^Full statespace search for' "$out"; then
		echo "not exhaustive"
	elif grep -q 'errors: 0$' "$out" && ! grep -q 'Search not completed' "$out"; then
		echo "no error"
	else
		echo "not exhaustive"
	fi
}

# row NAME checks a configuration and prints its line of the table. It fails if the
# verdict is not the expected one.
row() {
	local dir how expected found states depth
	how=$(field "$1" 3) expected=$(field "$1" 4)
	[ -n "$how" ] || fail "no configuration $1"
	dir=$(mktemp -d "$work/$1.XXXX")
	(prepare "$1" "$dir") || exit 1
	search "$dir" "$how"
	states=$(awk '/states, stored/ { print $1 }' "$dir/pan.out")
	depth=$(sed -n 's/.*depth reached \([0-9]*\),.*/\1/p' "$dir/pan.out")
	found=$(verdict "$dir" "$how")
	local mark=ok
	[ "$found" = "$expected" ] || mark="EXPECTED: $expected"
	printf '%-30s %11s %6s %7.1fs  %-46s %s\n' "$1" "${states:-?}" "${depth:-?}" "$(cat "$dir/pan.time")" "$found" "$mark"
	rm -rf "$dir"
	[ "$mark" = ok ]
}

trail() {
	local dir=$work/trail
	[ -n "$(field "$1" 3)" ] || fail "no configuration $1"
	mkdir "$dir"
	(prepare "$1" "$dir") || exit 1
	search "$dir" "$(field "$1" 3)"
	[ -e "$dir/model.pml.trail" ] || fail "$1: $(verdict "$dir" "$(field "$1" 3)")"
	# shellcheck disable=SC2046
	(cd "$dir" && spin -T $(cat flags) -t model.pml 2>&1) | sed '/^spin: [Ww]arning/d; /^spin:/,$d; /^ltl /d'
	echo "=> $(verdict "$dir" "$(field "$1" 3)")"
}

# texts prints the file, the line and the text of each assertion.
texts() {
	local file
	for file in switching.pml resuming.pml; do
		sed -n '/assert(.*\(VIOLATED\|REACHED\)/{=;s/.*\(VIOLATED\|REACHED\): \(.*\) \*\/.*/\2/p;}' "$here/$file" | paste - - | sed "s/^/$file\t/"
	done
}

# assertion FILE LINE TEXT takes the assertion out of the model. The verdict of the first
# configuration of that model that expects its violation has to change.
assertion() {
	local name dir found without
	name=$(expecting "$1" "$3" | head -1)
	[ -n "$name" ] || fail "no configuration expects: $3"
	without=$work/without-$1-$2
	mkdir "$without"
	sed "$2s/assert(.*)\(;\?\)\(\s*\/\*\)/skip\1\2/" "$here/$1" >"$without/$1"
	dir=$(mktemp -d "$work/$name.XXXX")
	(prepare "$name" "$dir") || exit 1
	search "$dir" "$(field "$name" 3)"
	found=$(verdict "$dir" "$(field "$name" 3)")
	rm -rf "$dir"
	printf '%-46s %-30s %s\n' "$3" "$name" "$found"
	[ "$found" != "$3" ]
}

# expecting FILE TEXT names the configurations of a model that expect a verdict.
expecting() {
	local name
	configurations | awk -F'|' -v text="$2" '$4 == text { print $1 }' | while read -r name; do
		case $(model "$name") in */"$1") echo "$name" ;; esac
	done
}

# assertions does that with each of them.
assertions() {
	while IFS=$'\t' read -r file line text; do
		begin "without-$file-$line" assertion "$file" "$line" "$text"
	done < <(texts)
	report all
	[ $bad = 0 ] || fail "$bad assertions were not missed"
}

# begin NAME COMMAND... runs the command beside others, and prints what it says, in order,
# as soon as that of those before it is there.
begin() {
	local name=$1
	shift
	while [ "$(jobs -rp | wc -l)" -ge "$jobs" ]; do
		wait -n || true
	done
	("$@" >"$work/$name.row") &
	started+=("$!:$name")
	report
}

report() { # report all: waits for them
	local name pid
	while [ $printed -lt ${#started[@]} ]; do
		name=${started[$printed]#*:} pid=${started[$printed]%%:*}
		if [ "${1-}" != all ] && kill -0 "$pid" 2>/dev/null; then
			return
		fi
		wait "$pid" || bad=$((bad + 1))
		cat "$work/$name.row"
		printed=$((printed + 1))
	done
}

missing=
for tool in spin gcc awk sed; do
	command -v "$tool" >/dev/null || missing="$missing $tool"
done
[ -z "$missing" ] || fail "missing:$missing (Debian: apt install spin gcc)"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
jobs=${JOBS:-2} bad=0 printed=0
started=()

case ${1-} in
trail)
	[ $# = 2 ] || fail "usage: check.sh trail NAME"
	trail "$2"
	exit
	;;
assertions)
	assertions
	exit
	;;
quick) when=q ;;
all) when=qnl ;;
'') when=qn ;;
*) when= ;;
esac

# An assertion that no configuration violates might as well not be there.
while IFS=$'\t' read -r file _ text; do
	[ -n "$(expecting "$file" "$text")" ] || fail "no configuration expects: $text"
done < <(texts)

if [ -n "$when" ]; then
	names=$(configurations | awk -F'|' -v when="$when" 'NF == 5 && index(when, $2) { print $1 }')
else
	names=$*
fi

printf '%-30s %11s %6s %8s  %s\n' configuration states depth time verdict
for name in $names; do
	begin "$name" row "$name"
done
report all
cat "$work"/*.row | awk '{
	if ($0 ~ /  no error  /) { clean++; states += $2 } else { found++; until += $2 }
	if ($4 + 0 >= longest) { longest = $4 + 0; name = $1 }
} END {
	printf "%d configurations without an error, %.0f states; %d up to an error, %.0f states; ", clean, states, found, until
	printf "the longest search: %s, %.1f s\n", name, longest
}'
[ $bad = 0 ] || fail "$bad verdicts are not as expected"
case $when in *n*)
	printf '\nwithout the assertion, the verdict on the configuration\n'
	assertions
	;;
esac
