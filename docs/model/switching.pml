/*
 * One logical stream, and how it migrates: docs/protocol.md, sections 4 and 6, as a
 * model for Spin. README.md tells what is modelled, what is not and why that does no
 * harm; check.sh runs everything.
 *
 *	             q[0], q[1]: the old stream, A's direction and B's
 *	   peer A  ===============================================  peer B
 *	(lower ID)   q[2], q[3]: the new stream of the first migration
 *	           ===============================================
 *	             q[4] ...:   that of the second ...
 *	                            ^
 *	                     world: what fails
 *
 * Each direction of each stream is a FIFO channel of its own, so that any may be slower
 * than any other. Each step of a peer is one d_step: what it does to itself and what it
 * sends. A step says what happens, in the words of docs/protocol.md, for spin -t.
 */

/* ---- what is checked; check.sh sets these ---- */

#ifndef K
#define K 2			/* bytes that each application may write */
#endif
#ifndef MIGRATIONS
#define MIGRATIONS 1		/* how often Migrate may be sent, by both sides together */
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
#ifndef NEW_FAILS
#define NEW_FAILS 1		/* each new stream may fail at any moment: reset, or dead connection */
#endif
#ifndef OLD_FAILS
#define OLD_FAILS 1		/* the old connection may die at any moment */
#endif
#ifndef OLD_LIES
#define OLD_LIES 1		/* and then report an EOF that is none */
#endif
#ifndef NEW_LIES
#define NEW_LIES 0		/* the same of a new stream, as long as it is not read as the stream */
#endif
#ifndef DENIALS
#define DENIALS 1		/* the responder may deny */
#endif
#ifndef CLOSE_READ
#define CLOSE_READ 0		/* the application of a peer that is not draft-only may close its reading */
#endif
#ifndef RESETS
#define RESETS 0		/* an application may reset the logical stream */
#endif
#ifndef CHECK_DRAFT
#define CHECK_DRAFT 1		/* also demand of draft-only peers that they lose nothing silently */
#endif

/*
 * Variants, each with one rule broken: NO_S1 NO_S3 NO_S4 NO_S5 NO_S5_EXCEPTION NO_S6
 * NO_S10_INITIATOR NO_S10_RESPONDER NO_S12 NO_M1. Candidates, each with one rule added
 * or changed: FORGIVING, PROOF_ON_NEW.
 */

#define VERIFIED	(!DRAFT_A && !DRAFT_B)
#define STREAMS		(1 + MIGRATIONS)
#define NONE		0

mtype = { DATA, FIN, MIGRATE, ACK, DENY, SIZE };	/* what a channel carries */
mtype = { END, FALSE_END, ERROR, CLOSED };		/* how reading ends */
mtype = { idle, asked, unready, acked, proof, handing };	/* the exchange of a peer */
mtype = { old, new, new2, new3 };			/* the streams, when spin -t names them */

/*
 * A direction that was cut was reset by its sender, or its connection died: what is in
 * flight may still be read, to any point, and then comes an error. One that is let go
 * will not be read any more.
 */
#define FLOWS	0
#define CUT	1
#define LET_GO	2

chan q[2 * STREAMS] = [K + 3] of { mtype, byte };
byte flow[2 * STREAMS];
bool dead[STREAMS];	/* the stream failed for an outer reason; of the old one: its connection died */
byte opened;		/* new streams so far */
bool broken;		/* something has failed: an application may see an error now */
bool calm;		/* nothing will fail any more, and nothing else can happen */

/* What the applications know. */
byte wrote[2];		/* bytes written */
bool wclosed[2];	/* the end of writing */
byte seen[2];		/* how reading ended: NONE, END, ERROR, or CLOSED by the reader */

byte outcome[2];	/* 1 + the stream that it stands on, or FAILED; at the end of a run */
#define FAILED	99

#define NAME(p)		('A' + (p))
#define STREAM(s)	(s == 0 -> old : (s == 1 -> new : (s == 2 -> new2 : new3)))
#define OUT(s)		(2 * (s) + p)
#define IN(s)		(2 * (s) + 1 - p)

#define DRAFT(p)	(p == 0 -> DRAFT_A : DRAFT_B)
#define MINE		(!DRAFT(p))	/* this peer is not draft-only */
#define CHECKED		(CHECK_DRAFT || MINE)

/* ---- steps that several transitions share; p is the peer ---- */

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
	letGo(s)
}

/* The exchange is over; the stream is where on and from say. */
inline rest() {
	ex = idle; x = 0; initiator = false; final = 0
}

/* S8, and what an application does that was told of an error. */
inline abort() {
	printf("   %c: the stream is reset\n", NAME(p));
	assert(broken || !VERIFIED);	/* a migration alone never costs a stream */
	reset(from);
	if
	:: on != from -> reset(on)
	:: else
	fi;
	if
	:: x != 0 && x != on && x != from -> reset(x)
	:: else
	fi;
	if
	:: seen[p] == NONE -> seen[p] = ERROR; printf("   %c: application: error\n", NAME(p))
	:: else
	fi;
	failed = true; ended = NONE; got = 0; count = 0; base = 0;
	rest()
}

/* The application is given EOF. lie: a muxer's own, outside of a migration. */
inline giveEnd(lie) {
	printf("   %c: application: EOF\n", NAME(p));
	assert(lie || !CHECKED || (wclosed[1 - p] && got == wrote[1 - p]));	/* no silent truncation */
	seen[p] = END
}

/* Nobody waits for the attempt any more: the stream stays on the old stream (S9). */
inline fallBack() {
	printf("   %c: the attempt is over, on with %e\n", NAME(p), STREAM(on));
	rest()
}

/* S2, S3, S6, S12: writing moves to x. */
inline switchSending() {
	if
	:: VERIFIED ->
		printf("   %c: %e: FinalSize(%d)\n", NAME(p), STREAM(x), wrote[p] - base);
		send(x, SIZE, wrote[p] - base)
	:: else
	fi;
	if
	:: !wclosed[p] -> printf("   %c: %e: EOF, the migration's\n", NAME(p), STREAM(on)); send(on, FIN, 0)
	:: else
#ifndef NO_S6
		-> printf("   %c: %e: EOF, the application's\n", NAME(p), STREAM(x)); send(x, FIN, 0)
#endif
	fi;
	on = x; base = wrote[p]
}

/* S4: reading moves to x. The old stream is let go of. */
inline switchReceiving() {
	printf("   %c: goes on reading with %e\n", NAME(p), STREAM(x));
	letGo(from);
	from = x; count = 0; ended = NONE;
	if
	:: seen[p] == CLOSED -> letGo(x)
	:: else
	fi;
	rest()
}

/* ---- when a step can be taken ---- */

#define HAS(s, message)	q[IN(s)]?[message,v]
#define CURRENT(s)	q[IN(s)]?[MIGRATE,eval(on)]	/* its from is the present label */
#define BROKEN(s)	(flow[IN(s)] == CUT)
#define HELD		(ex == asked || ex == acked || ex == proof)	/* S1, S5 */
#define COMPLETE	(ex == handing && VERIFIED && count == final)
#ifdef FORGIVING
#define DOUBTED		(untrusted && wclosed[p] && on == tried)
#else
#define DOUBTED		(untrusted && wclosed[p])
#endif
#define READS		(!failed && seen[p] == NONE && ended == NONE && !COMPLETE)
#define FREE		(ex == idle && !failed && !denied)

/* An end of the stream that is read now, or was kept back, is the application's. */
#ifdef NO_S5
#define PLAIN		(ex == idle || ex == unready || ex == asked)
#else
#define PLAIN		(ex == idle || ex == unready || ex == asked && !MINE)
#endif

/*
 * The responder, and Migrate on stream k. A peer that is draft-only and asks itself, or
 * has not ended its last migration, says "later"; the draft does not say what it does.
 */
#define ANSWERS(k) \
	:: d_step { HAS(k, MIGRATE) && failed -> \
		q[IN(k)]?MIGRATE,v; \
		printf("%c: %e: reads Migrate, denies: there is no such stream\n", NAME(p), STREAM(k)); \
		send(k, DENY, 0); letGo(k); v = 0 } \
	:: d_step { HAS(k, MIGRATE) && BROKEN(k) -> \
		printf("%c: %e: error instead of Migrate, or the ack cannot leave\n", NAME(p), STREAM(k)); \
		reset(k) } \
	:: d_step { HAS(k, MIGRATE) && ex == idle && !failed && (DENIALS || !CURRENT(k) || MINE && !VERIFIED && seen[p] == CLOSED) -> \
		q[IN(k)]?MIGRATE,v; \
		printf("%c: %e: reads Migrate, denies\n", NAME(p), STREAM(k)); \
		send(k, DENY, 0); letGo(k); v = 0 } \
	:: d_step { HAS(k, MIGRATE) && ex == idle && !failed && CURRENT(k) && !(MINE && !VERIFIED && seen[p] == CLOSED) -> \
		q[IN(k)]?MIGRATE,v; v = 0; \
		printf("%c: %e: reads Migrate, sends the ack\n", NAME(p), STREAM(k)); \
		send(k, ACK, 0); x = k; \
		ACKED } \
	:: d_step { HAS(k, MIGRATE) && !failed && (ex == asked && (p == 0 || !MINE) || ex == acked || ex == proof || ex == handing) && !BOTH_ACK -> \
		q[IN(k)]?MIGRATE,v; v = 0; \
		printf("%c: %e: reads Migrate, resets it: later\n", NAME(p), STREAM(k)); \
		reset(k) } \
	:: d_step { HAS(k, MIGRATE) && !failed && ex == asked && p == 1 && MINE && !BOTH_ACK -> \
		printf("%c: %e: reads Migrate; its own attempt gives way (M1)\n", NAME(p), STREAM(k)); \
		reset(x); \
		untrusted = (untrusted || DRAFT(1 - p)); tried = on; fallBack() } \
	:: d_step { HAS(k, MIGRATE) && !failed && ex == asked && BOTH_ACK -> \
		q[IN(k)]?MIGRATE,v; v = 0; \
		printf("%c: %e: reads Migrate, sends the ack, although it asks itself\n", NAME(p), STREAM(k)); \
		send(k, ACK, 0) }

#ifdef NO_M1
#define BOTH_ACK	true
#else
#define BOTH_ACK	false
#endif

#ifdef NO_S1
#define READY		unready
#else
#define READY		acked
#endif

#ifdef NO_S3
#define CLOSES_EARLY	MINE
#else
#define CLOSES_EARLY	false
#endif

/* What follows the ack at once: a plain draft-only responder goes by EOF on the old stream. */
#define ACKED \
	if \
	:: MINE && !CLOSES_EARLY -> ex = READY \
	:: MINE && CLOSES_EARLY -> ex = READY; switchSending() \
	:: !MINE && seen[p] == NONE -> ex = handing \
	:: else -> switchSending(); switchReceiving() \
	fi

proctype peer(bit p) {
	byte on, from;		/* the streams that writing goes to and reading comes from */
	byte base;		/* bytes that were written to the streams before */
	byte got, count;	/* bytes read: in all, from the present stream */
	byte ended;		/* how the present stream ended, while that is kept back */
	byte ex = idle;
	byte x, final;		/* the exchange's new stream, and the peer's final size */
	bool initiator;
	bool denied;		/* M3 */
	bool untrusted;		/* S5, the exception */
	byte tried;		/* where untrusted was set */
	bool failed;		/* the stream was reset */
	bool lied;		/* the old connection has lied once; often enough */
	byte v;			/* the value of the message that is read; 0 between steps */

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
		seen[p] = CLOSED; ended = NONE; letGo(from) }
#endif
#if RESETS
	:: d_step { !failed && (seen[p] == NONE || !wclosed[p]) && !calm ->
		printf("%c: application: resets the stream\n", NAME(p));
		broken = true; abort() }
#endif

	/* ---- reading ---- */

	:: d_step { READS && HAS(from, DATA) ->
		q[IN(from)]?DATA,v;
		printf("%c: %e: reads byte %d\n", NAME(p), STREAM(from), v);
		got++;
		assert(v == got || !CHECKED);	/* nothing lost, doubled or out of order */
		count++; v = 0 }
	:: d_step { READS && HAS(from, FIN) ->
		q[IN(from)]?FIN,v; v = 0;
		printf("%c: %e: reads EOF\n", NAME(p), STREAM(from));
		if
		:: PLAIN && DOUBTED -> abort()
		:: PLAIN && !DOUBTED -> giveEnd(false)
		:: else -> ended = END
		fi }
	:: d_step { READS && BROKEN(from) && !lied && (OLD_LIES && dead[0] && from == 0) ->
		lied = true;
		printf("%c: %e: reads a false EOF\n", NAME(p), STREAM(from));
		if
		:: PLAIN && DOUBTED -> abort()
		:: PLAIN && !DOUBTED -> giveEnd(true)
		:: else -> ended = FALSE_END
		fi }
	:: d_step { READS && BROKEN(from) ->
		printf("%c: %e: reads an error\n", NAME(p), STREAM(from));
		if
		:: PLAIN || ex == handing -> abort()
		:: else -> ended = ERROR; letGo(from)
		fi }
	/* S11; after a false EOF, it shows here */
	:: d_step { !failed && ex == idle && seen[p] == END && HAS(from, DATA) ->
		printf("%c: %e: data after the end\n", NAME(p), STREAM(from));
		abort() }
	/* what was kept back was the application's after all */
	:: d_step { !failed && ex == idle && ended != NONE ->
		if
		:: ended == ERROR || DOUBTED -> abort()
		:: else -> giveEnd(ended == FALSE_END); ended = NONE
		fi }

	/* ---- the initiator ---- */

	:: d_step { FREE && (p == 0 -> INIT_A : INIT_B) && opened < MIGRATIONS && !calm ->
		opened++; x = opened; initiator = true; ex = asked;
		printf("%c: %e: Migrate\n", NAME(p), STREAM(x));
		send(x, MIGRATE, on) }
	:: d_step { ex == asked && HAS(x, ACK) ->
		q[IN(x)]?ACK,v; v = 0;
		printf("%c: %e: reads the ack\n", NAME(p), STREAM(x));
		switchSending();
		ex = (VERIFIED -> acked : handing);
		if
		:: !VERIFIED && seen[p] != NONE -> switchReceiving()
		:: else
		fi }
	:: d_step { ex == asked && HAS(x, DENY) ->
		q[IN(x)]?DENY,v; v = 0;
		printf("%c: %e: reads the denial\n", NAME(p), STREAM(x));
		denied = true; reset(x); fallBack() }
	:: d_step { ex == asked && BROKEN(x) ->
		printf("%c: %e: error before the ack\n", NAME(p), STREAM(x));
		reset(x);
#ifndef NO_S5_EXCEPTION
		untrusted = (untrusted || MINE && DRAFT(1 - p)); tried = on;
#endif
		fallBack() }
#ifdef NO_S10_INITIATOR
	:: d_step { ex == asked && !calm ->
		printf("%c: %e: no ack in time, resets it\n", NAME(p), STREAM(x));
		reset(x);
		untrusted = (untrusted || MINE && DRAFT(1 - p)); tried = on;
		fallBack() }
#endif

	/* ---- the responder ---- */

	ANSWERS(1)
#if MIGRATIONS > 1
	ANSWERS(2)
#endif
#if MIGRATIONS > 2
	ANSWERS(3)
#endif
#ifdef NO_S1
	:: d_step { ex == unready -> ex = acked; printf("%c: is ready for the new stream\n", NAME(p)) }
#endif
#ifdef NO_S10_RESPONDER
	:: d_step { ex == acked && !initiator && !calm ->
		printf("%c: %e: no FinalSize in time, resets it\n", NAME(p), STREAM(x));
		reset(x); fallBack() }
#endif
	/* S3, the initiator is draft-only: has the old stream ended before? */
	:: d_step { ex == acked && !VERIFIED ->
		if
		:: ended != NONE || seen[p] != NONE -> ex = proof
#ifdef PROOF_ON_NEW
		:: else -> ex = proof
#else
		:: else -> ex = handing
#endif
		fi }
	:: d_step { ex == proof && (nempty(q[IN(x)]) || NEW_LIES && BROKEN(x)) ->
		printf("%c: %e: the ack has arrived, since something came\n", NAME(p), STREAM(x));
		if
		:: seen[p] == END && HAS(x, DATA) -> abort()
		:: else ->
			ex = handing;
#ifdef PROOF_ON_NEW
			switchSending();
#endif
			if
			:: seen[p] != NONE -> switchSending(); switchReceiving()
			:: else
			fi
		fi }

	/* ---- both ---- */

	:: d_step { ex == acked && HAS(x, SIZE) ->
		q[IN(x)]?SIZE,v; final = v; v = 0;
		printf("%c: %e: reads FinalSize(%d)\n", NAME(p), STREAM(x), final);
		if
		:: on != x -> switchSending()
		:: else
		fi;
		ex = handing }
	/* S8; when it is noticed depends on who reads the new stream */
	:: d_step { (ex == acked || ex == proof || ex == handing) && BROKEN(x) ->
		printf("%c: %e: error after the ack\n", NAME(p), STREAM(x));
		abort() }

	/* S12: all bytes are there, or they cannot be */
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
	:: d_step { ex == handing && VERIFIED && ended == NONE && seen[p] == NONE && count < final -> switchReceiving() }
#endif

	/* draft: the old stream has ended, and is believed */
	:: d_step { ex == handing && !VERIFIED && (ended == END || ended == FALSE_END && !MINE) ->
		if
		:: on != x -> switchSending()
		:: else
		fi;
		switchReceiving() }
	/* or not: it failed, or is an EOF from a connection that is closed by now */
	:: d_step { ex == handing && !VERIFIED && (ended == ERROR || MINE && ended != NONE && dead[from]) ->
		printf("   %c: the end of %e is not believed\n", NAME(p), STREAM(from));
		abort() }
	:: d_step { ex == handing && !VERIFIED && seen[p] == CLOSED && (on == x || nempty(q[IN(x)])) ->
		if
		:: on != x -> switchSending()
		:: else
		fi;
		switchReceiving() }

	/* ---- the end of the run ---- */

	:: atomic { calm && seen[p] != NONE && (failed || wclosed[p]) && ex == idle ->
		assert(failed || on == from);
		outcome[p] = (failed -> FAILED : 1 + on);
		/* both on old, or both on new; an error was seen by whoever had something yet to see */
		assert(outcome[0] == outcome[1] || outcome[1 - p] == 0 || outcome[0] == FAILED || outcome[1] == FAILED || !VERIFIED);
		break }
	od
}

/* What fails, and when the run is over: when nothing but a failure could happen. */
#define FAILS(s) \
	:: d_step { opened >= s && !dead[s] && (flow[2 * (s)] == FLOWS || flow[2 * (s) + 1] == FLOWS) -> \
		printf("%e fails\n", STREAM(s)); \
		dead[s] = true; broken = true; \
		if :: flow[2 * (s)] == FLOWS -> flow[2 * (s)] = CUT :: else fi; \
		if :: flow[2 * (s) + 1] == FLOWS -> flow[2 * (s) + 1] = CUT :: else fi }

proctype world() {
	do
#if OLD_FAILS
	FAILS(0)
#endif
#if NEW_FAILS
	FAILS(1)
#if MIGRATIONS > 1
	FAILS(2)
#endif
#if MIGRATIONS > 2
	FAILS(3)
#endif
#endif
	:: break
	od;
	timeout -> calm = true
}

init {
	atomic { run peer(0); run peer(1); run world() }
}
