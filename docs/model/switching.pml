/*
 * One logical stream, and how it migrates: docs/protocol.md, sections 4 and 6, as a
 * model for Spin. README.md tells what is modelled, what is not and why that does no
 * harm; check.sh runs everything.
 *
 *	               q[0], q[1]: the old stream, A's direction and B's
 *	    peer A  ================================================  peer B
 *	  (lower ID)   q[2], q[3]: the new stream of the first migration
 *	            ================================================
 *	               q[4] ...: that of the second ...
 *	                             ^
 *	                      world: what fails
 *
 * Each direction of each stream is a FIFO channel of its own, so any of them may be
 * slower than any other. A step of a peer is one d_step: what it reads, what that does to
 * it, what it sends. For spin -t it says so in the words of docs/protocol.md.
 */

/* ---- what is checked; check.sh sets these ---- */

#ifndef K
#define K 2			/* bytes that each application may write */
#endif
#ifndef MIGRATIONS
#define MIGRATIONS 1		/* how often Migrate may be sent, by both sides together: 1 to 3 */
#endif
#ifndef INIT_A
#define INIT_A 1		/* A may migrate the stream */
#endif
#ifndef INIT_B
#define INIT_B 0		/* B may; with both, M1 */
#endif
#ifndef DRAFT_A
#define DRAFT_A 0		/* A is a draft-only peer */
#endif
#ifndef DRAFT_B
#define DRAFT_B 0		/* B is */
#endif
#ifndef DRAFT_HOLDS
#define DRAFT_HOLDS 0		/* a draft-only initiator keeps back an EOF until it has the ack */
#endif
#ifndef NEW_FAILS
#define NEW_FAILS 1		/* each new stream may fail at any moment: reset, or dead connection */
#endif
#ifndef OLD_FAILS
#define OLD_FAILS 1		/* the old connection may die at any moment */
#endif
#ifndef OLD_LIES
#define OLD_LIES 1		/* and then report an EOF that is none */
#endif
#ifndef DENIALS
#define DENIALS 1		/* the responder's configuration may refuse a migration */
#endif
#ifndef CLOSE_READ
#define CLOSE_READ 0		/* applications may close their reading, but for those of draft-only peers */
#endif
#ifndef RESETS
#define RESETS 0		/* applications may reset the logical stream */
#endif
#ifndef CAUSES
#define CAUSES 0		/* a failure excuses only who loses a stream that is in use, or was acked */
#endif
#ifndef CHECK_DRAFT
#define CHECK_DRAFT 1		/* demand of draft-only peers, too, that they lose nothing silently */
#endif

#ifndef DOUBT_EXCUSED
#define DOUBT_EXCUSED 1		/* an end that cannot be told from a migration's may become an error (S5) */
#endif

/* A change to the rules that README.md discusses. */
#ifndef PROOF_ON_NEW
#define PROOF_ON_NEW 0		/* S3: only what comes on the new stream proves the ack to have arrived */
#endif

/*
 * Variants with a rule broken, to be defined: NO_S1 NO_S2 NO_S3 NO_S4 NO_S5
 * NO_S5_EXCEPTION NO_S6 NO_S10_INITIATOR NO_S10_RESPONDER NO_S12 NO_S12_PROOF NO_M1
 * NO_M1_DENIAL NO_M1_PROOF NO_M1_HELD NO_M1_SAME NO_M2. Those with a bug that shows in
 * the outcome alone: BUG_STAYS BUG_HALF BUG_DEAF.
 */
#ifdef NO_M1
#define BOTH_ACK	true
#define ANSWERS_FIRST	(HAS(1, MIGRATE) || HAS(2, MIGRATE))
#else
#define BOTH_ACK	false
#define ANSWERS_FIRST	false
#endif
#ifdef NO_M1_DENIAL
#define DENIES_FIRST	false
#else
#define DENIES_FIRST	true
#endif
#ifdef NO_M1_PROOF
#define PROMISED	false
#else
#define PROMISED	bound
#endif
#ifdef NO_M1_HELD
#define HELD		false
#else
#define HELD		bound
#endif
#ifdef NO_M1_SAME
#define MEETS(s)	true
#else
#define MEETS(s)	CURRENT(s)
#endif
#ifdef NO_S1
#define READY		unready
#else
#define READY		acked
#endif
#ifdef NO_S3
#define CLOSES_EARLY	true
#else
#define CLOSES_EARLY	false
#endif
#ifdef NO_S5
#define BELIEVES_EARLY	true
#else
#define BELIEVES_EARLY	false
#endif
#ifdef NO_S12_PROOF
#define FALSE_PROOF	BROKEN(x)
#else
#define FALSE_PROOF	false
#endif
#ifdef NO_M2
#define DENIES_NEXT	true
#else
#define DENIES_NEXT	false
#endif
#ifdef NO_S5_EXCEPTION
#define DOUBTS		false
#else
#define DOUBTS		true
#endif

/* Questions with the answer yes, so that nothing is proved of a model that does nothing. */
#ifndef REACH
#define REACH 0			/* 1: a stream outlives its old connection; 2: a second attempt succeeds */
#endif				/* 3: one of two at once does; 4: a migration does */

/* ---- the network ---- */

#define STREAMS		(1 + MIGRATIONS)

mtype = { DATA, FIN, MIGRATE, ACK, DENY, SIZE };	/* what a channel carries */
mtype = { old, new, new2, new3 };			/* what the streams are called */

/*
 * A direction that was cut was reset by its sender, or its connection has died: what is
 * in flight may still be read, up to any point, and then comes an error. One that was let
 * go will not be read any more.
 */
#define FLOWS	0
#define CUT	1
#define LET_GO	2

chan q[2 * STREAMS] = [K + 3] of { mtype, byte };
byte flow[2 * STREAMS];
bool dead[STREAMS];	/* the stream has failed; the old one: its connection has died */
byte opened;		/* new streams so far */
bool broken;		/* something has failed, or was reset by an application */
bool calm;		/* the run is over: nothing but a failure could happen */
#if REACH == 3
bool gaveWay;		/* an attempt gave way to the other's (M1) */
#define NOTE_GAVE_WAY	gaveWay = true
#else
#define gaveWay		false
#define NOTE_GAVE_WAY	skip
#endif

#if CAUSES
bool lost;		/* one side has told the other by then */
#define NOTE_LOST	lost = true
#define CAUSE		(lost || dead[on] || dead[from] || x != 0 && ex != asked && dead[x])
#else
#define NOTE_LOST	skip
#define CAUSE		broken
#endif

#define NAME(p)		('A' + (p))
#define STREAM(s)	(s == 0 -> old : (s == 1 -> new : (s == 2 -> new2 : new3)))
#define OUT(s)		(2 * (s) + p)
#define IN(s)		(2 * (s) + 1 - p)

/* ---- what the applications know ---- */

mtype = { END, FALSE_END, ERROR, CLOSED };

#define NONE	0
#define FAILED	99

byte wrote[2];		/* bytes written */
bool wclosed[2];	/* the end of writing */
byte seen[2];		/* how reading ended: NONE, END, ERROR, or CLOSED by the reader */
byte outcome[2];	/* after the run: FAILED, or 1 + the stream that the logical one is on */
bool whole[2];		/* and it has failed, or has read all that the other wrote, or did not want it */

/*
 * A failure reaches whoever still reads: else that one is stuck. Where the other has read
 * the end before, or does not read, and has ended its writing, only its muxer may know. But
 * the stream that it writes to must not be left open.
 */
#define ONE_FAILED	((outcome[0] == FAILED) != (outcome[1] == FAILED))
#define SURVIVOR	(outcome[0] == FAILED)
#define UNREAD		(flow[2 * (outcome[SURVIVOR] - 1) + SURVIVOR] != FLOWS)

/*
 * With a draft-only peer, a responder may move although its ack is lost: the draft-only one
 * if it has read the end before, the other if an end crosses the ack. It is alone then on a
 * stream that has failed. Where all has been said both ways, and ended, neither needs to know.
 */
#define GONE(s)		(flow[2 * (s)] != FLOWS && flow[2 * (s) + 1] != FLOWS)
#define FINISHED	(!VERIFIED && broken && whole[0] && whole[1] && (GONE(outcome[0] - 1) || GONE(outcome[1] - 1)))

/* ---- the peers ---- */

mtype = { idle, asked, unready, acked, proof, handing };	/* the states of an exchange */

#define DRAFT(p)	(p == 0 -> DRAFT_A : DRAFT_B)
#define MINE		(!DRAFT(p))	/* this peer follows all rules */
#define VERIFIED	(!DRAFT_A && !DRAFT_B)
#define CHECKED		(CHECK_DRAFT || MINE)
#define TRUE_END	(wclosed[1 - p] && got == wrote[1 - p])

#define HAS(s, message)	q[IN(s)]?[message,v]
#define CURRENT(s)	q[IN(s)]?[MIGRATE,eval(on)]	/* its from is the present label */
#define BROKEN(s)	(flow[IN(s)] == CUT)

#define COMPLETE	(ex == handing && VERIFIED && count == final)
#define READS		(!failed && (seen[p] == NONE || seen[p] == CLOSED && HEEDED) && ended == NONE && !COMPLETE)

/* A migration may ask how much has gone through a stream: a final size, and not of the last one. */
#define COUNTS(s)	(VERIFIED && (s) < MIGRATIONS)

/* An end of the present stream is the application's; else it is kept back (S1, S5). */
#define PLAIN		(ex == idle && !HELD || ex == unready || ex == asked && (BELIEVES_EARLY || !MINE && !DRAFT_HOLDS))

/* S5, the exception: what an EOF means cannot be told. */
#define DOUBTFUL	(untrusted && MINE && wclosed[p])

/* S3: the old stream is read to its end for the proof's sake, whatever the application does. */
#define HEEDED		(MINE && !VERIFIED && !PROOF_ON_NEW && (PROMISED || ex == proof || ex == handing && on != x))

/* S3: without a final size there is no proof to be had. */
#define PROOFLESS	(MINE && !VERIFIED && (seen[p] == CLOSED && !PROMISED || ended == ERROR))

inline send(s, message, value) {
	if
	:: flow[OUT(s)] == FLOWS -> q[OUT(s)]!message,value
	:: else			/* accepted, and lost */
	fi
}

inline letGo(s) {
	do
	:: nempty(q[IN(s)]) -> q[IN(s)]?_,_
	:: empty(q[IN(s)]) -> break
	od;
	flow[IN(s)] = LET_GO
}

inline reset(s) {
	if
	:: flow[OUT(s)] == FLOWS -> flow[OUT(s)] = CUT
	:: else
	fi;
#ifndef BUG_DEAF
	letGo(s)
#endif
}

/* The exchange is over. */
inline rest() {
	ex = idle; x = 0; final = 0
}

/* S9: the stream stays where it is. */
inline fallBack() {
	printf("   %c: the attempt is over, on with %e\n", NAME(p), STREAM(on));
	rest()
}

/* The same for an attempt of which the peer may believe that it was acked. */
inline giveUp() {
	reset(x);
	untrusted = (untrusted || DOUBTS && !VERIFIED);
	fallBack()
}

/* M1: the Migrate that the promise was for will not be acked. */
inline redeem() {
	if
	:: bound && seen[p] == CLOSED -> ended = NONE; letGo(from)
	:: else
	fi;
	bound = false
}

/* S8, and what an application does that is told of an error. */
inline abort() {
	printf("   %c: the stream is reset\n", NAME(p));
	assert(CAUSE);	/* VIOLATED: a stream was lost although nothing had failed */
	NOTE_LOST;
	reset(from);
	if
	:: on != from -> reset(on)
	:: else
	fi;
	if
	:: x != 0 && x != on -> reset(x)
	:: else
	fi;
	if
	:: seen[p] == NONE -> seen[p] = ERROR; printf("   %c: application: error\n", NAME(p))
	:: else
	fi;
	failed = true; denied = false; untrusted = false; bound = false; lied = false;
	ended = NONE; from = 0; got = 0; count = 0; base = 0;
	rest()
}

/* S5, the exception: the stream is lost, maybe for nothing; not if the next exchange will tell. */
inline doubt() {
	broken = broken || DOUBT_EXCUSED && !bound;
	abort()
}

/* excused: a muxer has lied, and no migration was under way on this side. */
inline giveEnd(excused) {
	printf("   %c: application: EOF\n", NAME(p));
	assert(excused || !CHECKED || TRUE_END);	/* VIOLATED: EOF before all that was written */
	broken = broken || !CHECKED && !TRUE_END;
	seen[p] = END
}

/* S2, S3, S6, S12: writing moves to x, and the old stream is closed for writing. */
inline switchSending() {
	if
	:: VERIFIED ->
		printf("   %c: %e: FinalSize(%d)\n", NAME(p), STREAM(x), wrote[p] - base);
		send(x, SIZE, wrote[p] - base)
	:: else
	fi;
	if
	:: !wclosed[p] ->
		printf("   %c: %e: EOF, the migration's\n", NAME(p), STREAM(on));
		send(on, FIN, 0)
	:: else
#ifndef NO_S6
		-> printf("   %c: %e: EOF, the application's\n", NAME(p), STREAM(x));
		send(x, FIN, 0)
#endif
	fi;
#ifdef NO_S2
	if
	:: wrote[p] > base -> printf("   %c: %e: writes byte %d anew\n", NAME(p), STREAM(x), wrote[p]); send(x, DATA, wrote[p])
	:: else
	fi;
#endif
#ifdef BUG_HALF
	if
	:: p == 0 -> on = x
	:: else
	fi;
#else
	on = x;
#endif
	base = (COUNTS(x) -> wrote[p] : 0)
}

inline switchSendingOnce() {
	if
	:: on != x -> switchSending()
	:: else
	fi
}

/* S4: reading moves to x, and the old stream is let go. */
inline switchReceiving() {
	printf("   %c: goes on reading with %e\n", NAME(p), STREAM(x));
	letGo(from);
	from = x; count = 0; ended = NONE; untrusted = false;
	if
	:: seen[p] == CLOSED -> letGo(x)	/* S6 */
	:: else
	fi;
	rest()
}

proctype peer(bit p) {
	byte on, from;		/* the streams that writing goes to and reading comes from */
	byte base;		/* bytes that were written to streams before on */
	byte got, count;	/* bytes read: in all, from the present stream */
	byte ended;		/* how the present stream ended, while that is kept back */
	byte ex = idle;
	byte x, final;		/* the exchange's new stream, the other's final size */
	bool denied;		/* M3 */
	bool untrusted;		/* S5: an attempt from this stream ended by a reset before the ack */
	bool bound;		/* M1: an attempt gave way, which is a promise */
	bool failed;		/* the logical stream was reset */
	bool lied;		/* the old connection has lied to this peer; once is enough */
	byte k, v;		/* of the message that is read; 0 between steps */

	do

	/* ---- the application ---- */

	:: d_step { !failed && !wclosed[p] && wrote[p] < K ->
		wrote[p]++;
		printf("%c: %e: writes byte %d\n", NAME(p), STREAM(on), wrote[p]);
		send(on, DATA, wrote[p]) }
	:: d_step { !failed && !wclosed[p] ->
		wclosed[p] = true;
		printf("%c: %e: EOF, the application's\n", NAME(p), STREAM(on));
		send(on, FIN, 0) }
#if CLOSE_READ
	:: d_step { MINE && !failed && seen[p] == NONE ->
		printf("%c: application: closes its reading\n", NAME(p));
		seen[p] = CLOSED;
		if
		:: HEEDED
		:: else -> ended = NONE; letGo(from)
		fi }
#endif
#if RESETS
	:: d_step { !failed && !calm && (seen[p] == NONE || !wclosed[p]) ->
		printf("%c: application: resets the stream\n", NAME(p));
		broken = true; abort() }
#endif

	/* ---- reading the present stream ---- */

	:: d_step { READS && HAS(from, DATA) ->
		q[IN(from)]?DATA,v;
		printf("%c: %e: reads byte %d\n", NAME(p), STREAM(from), v);
		got++;
		count = (COUNTS(from) -> count + 1 : 0);
		assert(v == got || !CHECKED);	/* VIOLATED: a byte was lost, doubled or out of order */
		v = 0 }
	:: d_step { READS && HAS(from, FIN) ->
		q[IN(from)]?FIN,v; v = 0;
		printf("%c: %e: reads EOF\n", NAME(p), STREAM(from));
		if
		:: PLAIN && DOUBTFUL -> doubt()
		:: PLAIN && !DOUBTFUL -> giveEnd(false)
		:: else -> ended = END
		fi }
	:: d_step { READS && BROKEN(from) && OLD_LIES && dead[0] && from == 0 && !lied ->
		lied = true;
		printf("%c: %e: reads a false EOF\n", NAME(p), STREAM(from));
		if
		:: PLAIN && DOUBTFUL -> doubt()
		:: PLAIN && !DOUBTFUL -> giveEnd(ex == idle || !MINE)
		:: else -> ended = FALSE_END
		fi }
	:: d_step { READS && BROKEN(from) ->
		printf("%c: %e: reads an error\n", NAME(p), STREAM(from));
		if
		:: PLAIN || ex == handing -> abort()
		:: else -> ended = ERROR; letGo(from)
		fi }
	/* what was kept back turned out to be the application's */
	:: d_step { !failed && ex == idle && !HELD && ended != NONE ->
		if
		:: ended == ERROR -> abort()
		:: ended != ERROR && DOUBTFUL -> doubt()
		:: else -> giveEnd(ended == FALSE_END); ended = NONE
		fi }
	/* S11; it is an EOF that was false which shows here */
	:: d_step { !failed && ex == idle && seen[p] == END && HAS(from, DATA) ->
		printf("%c: %e: data after the end\n", NAME(p), STREAM(from));
		abort() }

	/* ---- the initiator ---- */

	:: d_step { ex == idle && !bound && !failed && !denied && !calm && (p == 0 -> INIT_A : INIT_B) && opened < MIGRATIONS ->
		opened++; x = opened; ex = asked;
		printf("%c: %e: Migrate\n", NAME(p), STREAM(x));
		send(x, MIGRATE, on) }
	:: d_step { ex == asked && HAS(x, ACK) && !ANSWERS_FIRST ->
		q[IN(x)]?ACK,v; v = 0;
		printf("%c: %e: reads the ack\n", NAME(p), STREAM(x));
		switchSending();
		ex = (VERIFIED -> acked : handing);
		if
		:: !VERIFIED && seen[p] != NONE -> switchReceiving()
		:: else
		fi }
	:: d_step { ex == asked && HAS(x, DENY) ->
		q[IN(x)]?DENY,v;
		assert(v == 0 || broken && (untrusted || GONE(on)));	/* VIOLATED: denied for good without a reason */
		v = 0;
		printf("%c: %e: reads the denial\n", NAME(p), STREAM(x));
		denied = (opened < MIGRATIONS); reset(x); fallBack() }
	:: d_step { ex == asked && BROKEN(x) ->
		printf("%c: %e: error before the ack\n", NAME(p), STREAM(x));
		giveUp() }
#ifdef NO_S10_INITIATOR
	:: d_step { ex == asked && !calm ->
		printf("%c: %e: no ack in time, resets it\n", NAME(p), STREAM(x));
		giveUp() }
#endif

	/* ---- the responder: one of the Migrates that are there, in any order ---- */

	:: atomic {
		if
		:: HAS(1, MIGRATE) && ex != unready -> k = 1
#if MIGRATIONS > 1
		:: HAS(2, MIGRATE) && ex != unready -> k = 2
#endif
#if MIGRATIONS > 2
		:: HAS(3, MIGRATE) && ex != unready -> k = 3
#endif
		fi;
		if
		:: d_step { BROKEN(k) ->
			printf("%c: %e: error instead of Migrate, or the ack cannot leave\n", NAME(p), STREAM(k));
			reset(k); redeem() }
		:: d_step { failed || ex == idle && (DENIALS && !bound || PROOFLESS || !CURRENT(k)) ->
			printf("%c: %e: reads Migrate, denies\n", NAME(p), STREAM(k));
			if
			:: failed || CURRENT(k)
			:: else -> v = 1
			fi;
			send(k, DENY, v); letGo(k); redeem(); v = 0 }
		:: d_step { ex == idle && !failed && CURRENT(k) && !PROOFLESS ->
			printf("%c: %e: reads Migrate, sends the ack\n", NAME(p), STREAM(k));
			q[IN(k)]?MIGRATE,v; v = 0;
			send(k, ACK, 0); x = k; bound = false;
			if
			:: VERIFIED -> ex = READY
			/* S3: EOF on the old stream is the proof, unless it has come before */
			:: MINE && !VERIFIED && (PROOF_ON_NEW || ended != NONE || seen[p] == END) -> ex = proof
			:: MINE && !VERIFIED && !PROOF_ON_NEW && ended == NONE && seen[p] != END -> ex = handing
			/* the draft: it is the sign to switch; here it has come before */
			:: !MINE && seen[p] == NONE -> ex = handing
			:: !MINE && seen[p] != NONE -> switchSending(); switchReceiving()
			fi;
			if
			:: VERIFIED && CLOSES_EARLY -> switchSending()
			:: else
			fi }
		/* M1; of a draft-only peer that asks itself it is assumed that it says "later" */
		:: d_step { ex == asked && (p == 0 || !MINE || !MEETS(k)) && !BOTH_ACK ->
			printf("%c: %e: reads Migrate, resets it: its own goes first\n", NAME(p), STREAM(k));
			reset(k) }
		:: d_step { ex == asked && p == 1 && MINE && MEETS(k) && !BOTH_ACK && !PROOFLESS ->
			printf("%c: %e: reads Migrate; its own attempt gives way\n", NAME(p), STREAM(k));
			giveUp(); bound = DENIES_FIRST; NOTE_GAVE_WAY }
		:: d_step { ex == asked && MINE && CURRENT(k) && (DENIALS && DENIES_FIRST || PROOFLESS) ->
			printf("%c: %e: reads Migrate, denies, goes on asking\n", NAME(p), STREAM(k));
			send(k, DENY, 0); letGo(k) }
		:: d_step { ex == asked && BOTH_ACK ->
			printf("%c: %e: reads Migrate, sends the ack, goes on asking\n", NAME(p), STREAM(k));
			send(k, ACK, 0); letGo(k) }
		/* M2; or it waits, by doing something else first */
		:: d_step { ex == acked || ex == proof || ex == handing ->
			printf("%c: %e: reads Migrate, resets it: the last one has not ended\n", NAME(p), STREAM(k));
			reset(k) }
		:: d_step { DENIES_NEXT && (ex == acked || ex == proof || ex == handing) ->
			printf("%c: %e: reads Migrate, denies: the last one has not ended\n", NAME(p), STREAM(k));
			send(k, DENY, 1); letGo(k) }
		fi;
		k = 0 }
#ifdef NO_S1
	:: d_step { ex == unready ->
		printf("%c: is ready for %e\n", NAME(p), STREAM(x));
		ex = acked }
#endif
#ifdef NO_S10_RESPONDER
	:: d_step { ex == acked && on != x && !calm ->
		printf("%c: %e: no FinalSize in time, resets it\n", NAME(p), STREAM(x));
		reset(x); fallBack() }
#endif
	/* S3: from a draft-only initiator whose old stream had ended before */
	:: d_step { ex == proof && (nempty(q[IN(x)]) || FALSE_PROOF) ->
		if
		:: nempty(q[IN(x)]) -> printf("%c: %e: something came, so the ack has arrived\n", NAME(p), STREAM(x))
		:: empty(q[IN(x)]) -> printf("%c: %e: reads a false EOF, so the ack has arrived\n", NAME(p), STREAM(x))
		fi;
		if
		:: seen[p] == END && HAS(x, DATA) -> abort()	/* S11 */
		:: else ->
			ex = handing;
			if
			:: PROOF_ON_NEW || seen[p] == END -> switchSending()
			:: else
			fi;
			if
			:: seen[p] == END || PROOF_ON_NEW && seen[p] == CLOSED -> switchReceiving()
			:: else
			fi
		fi }

	/* ---- both sides, after the ack ---- */

	:: d_step { ex == acked && HAS(x, SIZE) ->
		q[IN(x)]?SIZE,v; final = v; v = 0;
		printf("%c: %e: reads FinalSize(%d)\n", NAME(p), STREAM(x), final);
#ifdef BUG_STAYS
		if
		:: seen[p] == END && wclosed[p] && x != 0 && p == 1 -> send(x, SIZE, wrote[p] - base); rest()
		:: else -> switchSendingOnce(); ex = handing
		fi }
#else
		switchSendingOnce();
		ex = handing }
#endif
	/* S8; when that is noticed depends on who reads the new stream */
	:: d_step { (ex == acked || ex == proof || ex == handing) && BROKEN(x) ->
		printf("%c: %e: error after the ack\n", NAME(p), STREAM(x));
		abort() }

	/* S12: all bytes are there, or they cannot be, or more may be on their way */
	:: d_step { ex == handing && VERIFIED && (count == final || seen[p] == CLOSED) -> switchReceiving() }
	:: d_step { ex == handing && VERIFIED && count < final && (ended != NONE || seen[p] == END) ->
#ifdef NO_S12
		if
		:: ended == END || ended == FALSE_END -> switchReceiving()
		:: else -> abort()
		fi }
#else
		printf("   %c: %d of %d bytes of %e are lost\n", NAME(p), final - count, final, STREAM(from));
		abort() }
#endif
	:: d_step { ex == handing && VERIFIED && count < final && ended == FALSE_END -> ended = NONE }
	:: d_step { ex == handing && VERIFIED && count > final -> abort() }
#ifdef NO_S4
	:: d_step { READS && ex == handing && VERIFIED && count < final -> switchReceiving() }
#endif

	/* the draft: the old stream has ended, and is believed */
	:: d_step { ex == handing && !VERIFIED && (ended == END || ended == FALSE_END && !MINE) ->
		switchSendingOnce(); switchReceiving() }
	/* S12: or it is not, since it failed, or its connection is closed by now */
	:: d_step { ex == handing && !VERIFIED && (ended == ERROR || MINE && ended != NONE && dead[from]) ->
		printf("   %c: the end of %e is not believed\n", NAME(p), STREAM(from));
		abort() }
	:: d_step { ex == handing && !VERIFIED && seen[p] == CLOSED && on == x -> switchReceiving() }

	/* ---- after the run. Who cannot get here is stuck: an invalid end state ---- */

	:: atomic { calm && seen[p] != NONE && (failed || wclosed[p]) && ex == idle ->
		outcome[p] = (failed -> FAILED : 1 + on);
		assert(failed || on == from);	/* VIOLATED: reads from one stream and writes to another */
		whole[p] = (failed || seen[p] == CLOSED || TRUE_END || lied || !CHECKED);
		assert(outcome[0] == outcome[1] || outcome[1 - p] == 0 || outcome[0] == FAILED || outcome[1] == FAILED || FINISHED);	/* VIOLATED: one is on the old stream, one on the new */
		assert(outcome[1 - p] == 0 || !ONE_FAILED || whole[0] && whole[1] && UNREAD);	/* VIOLATED: one has failed, and the other cannot tell */
		assert(REACH != 1 || !(dead[0] && outcome[0] == 2 && outcome[1] == 2 && wrote[0] == K && wrote[1] == K && seen[0] == END && seen[1] == END));	/* REACHED: the stream outlives its old connection */
		assert(REACH != 2 || !(dead[1] && outcome[0] == 3 && outcome[1] == 3 && wrote[0] == K && wrote[1] == K && seen[0] == END && seen[1] == END));	/* REACHED: the second attempt succeeds */
		assert(REACH != 3 || !(gaveWay && outcome[0] == 3 && outcome[1] == 3 && wrote[0] == K && wrote[1] == K && seen[0] == END && seen[1] == END));	/* REACHED: one of two attempts at once succeeds */
		assert(REACH != 4 || !(!broken && outcome[0] == 2 && outcome[1] == 2 && wrote[0] == K && wrote[1] == K && seen[0] == END && seen[1] == END));	/* REACHED: the migration succeeds */
		break }
	od
}

proctype world() {
	byte s;
	do
	:: atomic {
		if
#if OLD_FAILS
		:: !dead[0] && (flow[0] == FLOWS || flow[1] == FLOWS) -> s = 0
#endif
#if NEW_FAILS
		:: opened >= 1 && !dead[1] && (flow[2] == FLOWS || flow[3] == FLOWS) -> s = 1
#if MIGRATIONS > 1
		:: opened >= 2 && !dead[2] && (flow[4] == FLOWS || flow[5] == FLOWS) -> s = 2
#endif
#if MIGRATIONS > 2
		:: opened >= 3 && !dead[3] && (flow[6] == FLOWS || flow[7] == FLOWS) -> s = 3
#endif
#endif
		:: false
		fi;
		d_step {
			printf("%e fails\n", STREAM(s));
			dead[s] = true; broken = true;
			if
			:: flow[2 * s] == FLOWS -> flow[2 * s] = CUT
			:: else
			fi;
			if
			:: flow[2 * s + 1] == FLOWS -> flow[2 * s + 1] = CUT
			:: else
			fi;
			s = 0
		} }
	:: !enabled(1) && !enabled(2) -> calm = true; break	/* the peers can do nothing more */
	od
}

init {
	atomic { run peer(0); run peer(1); run world() }
}

/* Every run comes to its end, whatever is done first. */
#ifdef ENDS
ltl ends { <> (outcome[0] != 0 && outcome[1] != 0) }
#endif
