/*
 * One logical stream that outlives its connections: docs/resumption.md, as a
 * model for Spin. README.md tells what is modelled, what is not and why that does no
 * harm; check.sh runs everything. Migrations without a loss are in switching.pml.
 *
 *	               q[0], q[1]: the first stream, A's direction and B's
 *	    peer A  ===================================================  peer B
 *	  (lower ID)   q[2], q[3]: the stream of an attempt ...
 *	            ===================================================
 *
 * peer is what an end does by itself, at once or later. user is what its application does,
 * or does not, and what befalls that end. world is what befalls connections. A stream that
 * both ends have let go of is used again for the next attempt.
 */

/* ---- what is checked; check.sh sets these ---- */

#ifndef KA
#define KA 1			/* bytes that A's application may write */
#endif
#ifndef KB
#define KB KA			/* bytes that B's may */
#endif
#ifndef RING
#define RING 9			/* bytes that an end keeps to send them again */
#endif
#ifndef FAULTS
#define FAULTS 2		/* deaths of connections, timeouts, paths that are held for silent: in all */
#endif
#ifndef STREAMS
#define STREAMS 5		/* underlying streams that exist at one time */
#endif
#ifndef MAX_EPOCH
#define MAX_EPOCH 15		/* more attempts than that are a run without end */
#endif
#ifndef CLOSES
#define CLOSES 0		/* applications may close the stream */
#endif
#ifndef CLOSE_READ
#define CLOSE_READ 0		/* or their reading alone */
#endif
#ifndef RESETS
#define RESETS 0		/* or reset it */
#endif
#ifndef PURPOSE
#define PURPOSE 0		/* an end may close the connection for good, and the reason may be lost */
#endif
#ifndef RESTARTS
#define RESTARTS 0		/* a process may restart: it has forgotten everything, and tells nobody */
#endif
#ifndef PATIENCE_ENDS
#define PATIENCE_ENDS 0		/* T may pass, at any moment at which it counts */
#endif
#ifndef TIMEOUTS
#define TIMEOUTS 0		/* an attempt, or the wait for the other's, may time out */
#endif
#ifndef SILENT
#define SILENT 0		/* a path that works may be held for silent */
#endif
#ifndef LIES
#define LIES 0			/* a dead connection may report an EOF that is none, and is seen to be closed */
#endif
#ifndef RACES
#define RACES 0			/* and it may still look open then */
#endif
#ifndef TOLD
#define TOLD 0			/* 1: ends are announced, sooner or later or never; 2: and no others are believed */
#endif
#ifndef CODELESS
#define CODELESS 0		/* resets carry no code */
#endif
#ifndef MIGRATIONS
#define MIGRATIONS 0		/* migrations of sections 4 and 6 besides: 0 to 2 */
#endif
#ifndef OPENS_A
#define OPENS_A 1		/* A can open streams */
#endif
#ifndef OPENS_B
#define OPENS_B 1
#endif

/*
 * Variants with a rule broken, to be defined: NO_EPOCHS (each end numbers its own attempts)
 * NO_STALE NO_FREEZE NO_RING NO_OFFSETS NO_END_AGAIN NO_END_CONFIRMED NO_WAIT
 * NO_MAX NO_TOMBSTONE NO_CODE NO_FINAL_RESET BELIEVES ENDS_EARLY IGNORES_RESET.
 */
#ifdef NO_STALE
#define STALE_AT	0
#else
#define STALE_AT	promised[p]
#endif
#ifdef NO_RING
#define KEPT		0
#else
#define KEPT		RING
#endif
#ifdef NO_END_CONFIRMED
#define THE_END		0
#else
#define THE_END		1
#endif
#ifdef NO_WAIT
#define HEEDS_WAIT	false
#else
#define HEEDS_WAIT	true
#endif
#ifdef NO_MAX
#define AT_LEAST(x)	(x)
#else
#define AT_LEAST(x)	MAX(x, confirmed[p])
#endif
#ifdef NO_TOMBSTONE
#define LETS_GO		true
#else
#define LETS_GO		(confirmed[p] >= TOTAL(p))
#endif
#ifdef NO_CODE
#define FINAL(s)	(flow[IN(s)] == RESET_FINAL || flow[IN(s)] == RESET_LOST && !dead[s])
#else
#define FINAL(s)	(flow[IN(s)] == RESET_FINAL && !CODELESS)
#endif
#ifdef NO_FREEZE
#define FREEZES		false
#else
#define FREEZES		true
#endif
#ifdef ENDS_EARLY
#define TOO_EARLY	true
#else
#define TOO_EARLY	false
#endif
#ifdef IGNORES_RESET
#define IGNORES		(mig[p] == ASKED && kept[p] == END)
#else
#define IGNORES		false
#endif
#ifdef BELIEVES
#define BELIEVED(s)	true
#else
#define BELIEVED(s)	(!dead[s])
#endif

/* Questions with the answer yes, so that nothing is proved of a model that does nothing. */
#ifndef REACH
#define REACH 0			/* 1: a stream outlives a connection, with bytes and ends both ways; 2: two */
#endif

/* ---- the network ---- */

mtype = { error, reset_by_protocol, reset_for_good };
mtype = { DATA, FIN, MIGRATE, ACK, DENY, STALE };	/* what a channel carries */
mtype = { MOVE, MOVE_ACK, SIZE, MOVE_FIN };		/* of a migration: Migrate, its ack, FinalSize, the EOF of old */

/*
 * A direction that has ended: what is in flight may still be read, up to any point, and then
 * comes what ended it. One that was let go will not be read any more.
 */
#define FLOWS		0
#define DEAD		1	/* its connection died */
#define RESET_LOST	2	/* reset with a code of the protocol: this stream is given up, not the logical one */
#define RESET_FINAL	3	/* reset for good */
#define LET_GO		4

#if KA > KB
#define MANY		(KA + 3)
#else
#define MANY		(KB + 3)
#endif

chan q[2 * STREAMS] = [MANY] of { mtype, byte, byte };
byte flow[2 * STREAMS];
bool dead[STREAMS];
byte faults = FAULTS, migrations = MIGRATIONS;
bool judged;
bool calm;			/* the run is over: nothing happens by itself any more */

#define OUT(s)		(2 * (s) + p)
#define IN(s)		(2 * (s) + 1 - p)
#define NAME(p)		('A' + (p))
#define MAX(x, y)	((x) > (y) -> (x) : (y))
#define MIN(x, y)	((x) < (y) -> (x) : (y))

/* ---- the two ends ---- */

#define OPEN	0	/* what the application knows */
#define CLOSED	1
#define RESET	2	/* it has reset the stream, or its process is gone */
#define FAILED	3	/* it was told of an error */

#define NOTHING	0	/* no stream; others count from 1 */
#define ALL	99	/* what has received an end that does not read */

byte app[2];
bool gone[2];		/* the entry */
byte wrote[2], got[2];	/* bytes */
bool ended[2];		/* the end of writing */
bool atEnd[2];		/* the other's was read */
bool deaf[2];		/* reading is closed */
byte confirmed[2];	/* the other has received so much; the end counts as one more */
byte cur[2], att[2];	/* the streams that it is on, and that of its attempt */
byte promised[2], heard[2];	/* epochs: promised, and the highest heard of */
bool waits[2];		/* for the other's attempt */
bool told[2];		/* where the other's writing ends */
byte label[2];

/* A migration (sections 4 and 6): the stream that it comes from is cur. */
#define NONE		0
#define ASKED		1
#define ACKED		2	/* the responder: it has acked */
#define SWITCHED	3	/* it writes to the new stream */

#define END		1
#define ERROR		2

byte mig[2];
byte new[2];		/* its new stream */
byte goal[2];		/* the other's final size, plus one; 0: not known yet */
byte kept[2];		/* how old has ended, while that is kept back */
#if REACH
byte resumed;
#endif

#define LABEL(epoch)	(MIGRATIONS * (100 + (epoch)))	/* of a resumption; only migrations look at labels */

#define TOTAL(p)	(wrote[p] + THE_END)
#define RECEIVED	(deaf[p] -> ALL : got[p] + (THE_END && atEnd[p]))
#define LOW		MAX(wrote[p] - MIN(wrote[p], KEPT), MIN(confirmed[p], wrote[p]))
#define DONE(p)		((atEnd[p] || deaf[p]) && ended[p])
#define NEEDS(p)	(!gone[p] && (confirmed[p] < TOTAL(p) || app[p] == OPEN && !DONE(p)))
#define LOST		(cur[p] == NOTHING || dead[cur[p] - 1] || mig[p] >= ACKED && dead[new[p] - 1])
#define USED(p, s)	(cur[p] == (s) + 1 || att[p] == (s) + 1 || new[p] == (s) + 1)
#define FREE(s)		(!USED(0, s) && !USED(1, s) && flow[2 * (s)] == LET_GO && flow[2 * (s) + 1] == LET_GO)
#define HAS(s, message)	q[IN(s)]?[message,_,_]
#define CUT(s)		(flow[IN(s)] != FLOWS && flow[IN(s)] != LET_GO)

/* R7: an EOF is kept back until more is known. */
#define KEPT_BACK(s)	(TOLD == 2 && mig[p] == NONE && cur[p] == (s) + 1 && HAS(s, FIN) && !told[p] && !atEnd[p] && !deaf[p] && !dead[s])
#define WAITING(s)	(new[p] == (s) + 1 && (HAS(s, DATA) || HAS(s, FIN)))	/* until old has been read */
#define NOTED(s)	(cur[p] == (s) + 1 && kept[p] != NONE && flow[IN(s)] == DEAD)
#define READABLE(s)	(CUT(s) && !NOTED(s) || nempty(q[IN(s)]) && !KEPT_BACK(s) && !WAITING(s))

/* Without T, Reset, a restart, or a ring that is too short, nobody loses anything. */
#define SURE		(!PATIENCE_ENDS && !RESETS && !PURPOSE && !RESTARTS && RING >= KA && RING >= KB)

inline send(s, message, first, second) {
	if
	:: flow[OUT(s)] == FLOWS -> q[OUT(s)]!message,first,second
	:: else			/* accepted, and lost */
	fi
}

inline discard(s) {
	do
	:: nempty(q[IN(s)]) -> q[IN(s)]?_,_,_
	:: empty(q[IN(s)]) -> break
	od
}

inline letGo(s) {
	discard(s);
	flow[IN(s)] = LET_GO
}

inline reset(s, code) {
	if
	:: flow[OUT(s)] == FLOWS -> flow[OUT(s)] = code
	:: else
	fi;
	letGo(s)
}

inline endMigration() {
	mig[p] = NONE; new[p] = NOTHING; goal[p] = 0; kept[p] = NONE
}

/* R13: who attempts or accepts a resumption drops the migration. */
inline dropMigration(code) {
	if
	:: new[p] != NOTHING -> reset(new[p] - 1, code)
	:: else
	fi;
	endMigration()
}

inline freeze() {
	if
	:: cur[p] != NOTHING -> reset(cur[p] - 1, RESET_LOST); cur[p] = NOTHING
	:: else
	fi;
	dropMigration(RESET_LOST)
}

inline dropAttempt(code) {
	if
	:: att[p] != NOTHING -> reset(att[p] - 1, code); att[p] = NOTHING
	:: else
	fi
}

/* R8: the entry goes, and each of its streams is reset for good. */
inline finish(how) {
	printf("   %c: the entry goes\n", NAME(p));
#ifdef NO_FINAL_RESET
	if
	:: cur[p] != NOTHING -> letGo(cur[p] - 1)
	:: else
	fi;
	if
	:: att[p] != NOTHING -> letGo(att[p] - 1); att[p] = NOTHING
	:: else
	fi;
	if
	:: new[p] != NOTHING -> letGo(new[p] - 1)
	:: else
	fi;
	endMigration();
#else
	if
	:: cur[p] != NOTHING -> reset(cur[p] - 1, RESET_FINAL)
	:: else
	fi;
	dropAttempt(RESET_FINAL);
	dropMigration(RESET_FINAL);
#endif
	if
	:: app[p] == OPEN -> app[p] = how
	:: else
	fi;
	gone[p] = true; cur[p] = NOTHING; waits[p] = false; told[p] = false;
	promised[p] = 0; heard[p] = 0; confirmed[p] = 0; label[p] = 0
}

/* R9: the application is told, unless there is nothing that it could be told. */
inline fail() {
	if
	:: app[p] == OPEN && DONE(p) -> finish(CLOSED)
	:: else -> finish(FAILED)
	fi;
	if
	:: app[p] == FAILED && SURE ->
		assert(app[1 - p] != OPEN);	/* VIOLATED: a stream was lost although nobody gave up */
		assert(atEnd[p] || deaf[p] || app[1 - p] == FAILED)	/* VIOLATED: what was written before Close was lost */
	:: else
	fi
}

/* All that the ring has from an offset on, and the end. */
inline sendFrom(s, from) {
#ifdef NO_OFFSETS
	i = 1;
#else
	i = from + 1;
#endif
	do
	:: i <= wrote[p] -> send(s, DATA, i, 0); i++
	:: i > wrote[p] -> break
	od;
	i = 0;
#ifndef NO_END_AGAIN
	if
	:: ended[p] && (from < TOTAL(p) || !THE_END) -> send(s, FIN, 0, 0)
	:: else
	fi
#endif
}

inline giveEnd() {
	if
	:: !deaf[p] && !atEnd[p] ->
		printf("   %c: application: EOF\n", NAME(p));
		assert(got[p] == wrote[1 - p] && ended[1 - p]);	/* VIOLATED: EOF before all that was written */
		atEnd[p] = true; told[p] = false
	:: else
	fi
}

/* R7: an EOF of a stream whose connection may be dead. */
inline judgeEnd(s, looksOpen) {
	if
	:: told[p] && !atEnd[p] ->
		if
		:: got[p] == wrote[1 - p] -> giveEnd()
		:: else -> freeze()
		fi
	:: else ->
		if
		:: looksOpen && TOLD < 2 || BELIEVED(s) -> giveEnd()
		:: else -> freeze()
		fi
	fi
}

inline unused() {
	do
	:: k < STREAMS && !FREE(k) -> k++
	:: else -> break
	od;
	assert(k < STREAMS)	/* the model has too few streams */
}

/* R2 */
inline attempt(s) {
	if
	:: FREEZES -> freeze()
	:: else
	fi;
#ifdef NO_EPOCHS
	x = promised[p] + 1;
#else
	x = MAX(promised[p], heard[p]) + 1;
	if
	:: x % 2 != p -> x++
	:: else
	fi;
#endif
	assert(x <= MAX_EPOCH);	/* VIOLATED: attempts without end */
	promised[p] = x;
#ifndef NO_EPOCHS
	heard[p] = x;
#endif
	att[p] = s + 1;
	flow[2 * s] = FLOWS; flow[2 * s + 1] = FLOWS; dead[s] = false;
	printf("%c: stream %d: Migrate(epoch %d, received %d)\n", NAME(p), s, x, RECEIVED);
	send(s, MIGRATE, x, RECEIVED);
	x = 0
}

/* R3; x is the epoch, y what the other has received. */
inline accept(s) {
	assert(y >= confirmed[p] || confirmed[p] == ALL || TOLD > 0);	/* VIOLATED: less received than was confirmed */
	y = AT_LEAST(y);
	if
	:: y < LOW ->
		printf("%c: stream %d: bytes from %d on are not there any more, denies\n", NAME(p), s, y);
		send(s, DENY, 0, 0); letGo(s); fail()
	:: else ->
		freeze();
		dropAttempt(RESET_LOST);
		confirmed[p] = MAX(confirmed[p], y);
		waits[p] = false; heard[p] = MAX(heard[p], x);
#ifndef NO_EPOCHS
		promised[p] = x;
#endif
		cur[p] = s + 1; label[p] = LABEL(x);
		printf("%c: stream %d: acks, has received %d\n", NAME(p), s, RECEIVED);
		send(s, ACK, RECEIVED, x);
		sendFrom(s, y)
	fi
}

inline readMigrate(s) {
	q[IN(s)]?MIGRATE,x,y;
	printf("%c: stream %d: reads Migrate(epoch %d, received %d)\n", NAME(p), s, x, y);
	if
	:: gone[p] -> send(s, DENY, 0, 0); letGo(s)
	:: else ->
		if
#ifdef NO_EPOCHS
		:: x <= heard[p] || att[p] != NOTHING && p == 0 ->
			printf("%c: stream %d: resets it: an old one, or its own goes first\n", NAME(p), s);
			reset(s, RESET_LOST)
#else
		:: x <= STALE_AT ->
			printf("%c: stream %d: stale\n", NAME(p), s);
			x = MAX(promised[p], heard[p]); y = (att[p] != NOTHING);
			send(s, STALE, x, y); letGo(s)
#endif
		:: else -> accept(s)
		fi
	fi;
	x = 0; y = 0
}

/* R4, R5, R6 */
inline readAnswer(s) {
	if
	:: HAS(s, ACK) ->
		q[IN(s)]?ACK,y,x;
		printf("%c: stream %d: reads the ack, received %d\n", NAME(p), s, y);
		if
		:: cur[p] != NOTHING -> letGo(cur[p] - 1)	/* only without R2's freezing */
		:: else
		fi;
		att[p] = NOTHING; cur[p] = s + 1; waits[p] = false; label[p] = LABEL(x); x = 0;
		y = AT_LEAST(y);
#if REACH
		if
		:: resumed < 2 -> resumed++
		:: else
		fi;
#endif
		if
		:: y < LOW -> fail()
		:: else -> confirmed[p] = MAX(confirmed[p], y); sendFrom(s, y)
		fi;
		y = 0
	:: else ->
		if
		:: HAS(s, DENY) ->
			q[IN(s)]?DENY,_,_;
			printf("%c: stream %d: reads the denial\n", NAME(p), s);
			att[p] = NOTHING; letGo(s); fail()
		:: else ->
			q[IN(s)]?STALE,x,y;
			printf("%c: stream %d: reads that it is stale\n", NAME(p), s);
			att[p] = NOTHING; letGo(s);
			waits[p] = (y && HEEDS_WAIT); heard[p] = MAX(heard[p], x);
			x = 0; y = 0
		fi
	fi
}

/* ---- a migration, sections 4 and 6 ---- */

inline switchSending() {
	printf("   %c: stream %d: FinalSize(%d)\n", NAME(p), new[p] - 1, wrote[p]);
	mig[p] = SWITCHED;
	if
	:: !ended[p] -> send(cur[p] - 1, MOVE_FIN, 0, 0)
	:: else
	fi;
	send(new[p] - 1, SIZE, wrote[p], 0);
	if
	:: ended[p] -> send(new[p] - 1, FIN, 0, 0)
	:: else
	fi
}

/* S4, S12; what is missing is a loss (R13). */
inline settle() {
	if
	:: mig[p] == SWITCHED && goal[p] != 0 ->
		if
		:: deaf[p] || got[p] + 1 == goal[p] ->
			printf("   %c: goes on with stream %d\n", NAME(p), new[p] - 1);
			letGo(cur[p] - 1); cur[p] = new[p]; endMigration()
		:: else ->
			if
			:: kept[p] != NONE -> freeze()
			:: else
			fi
		fi
	:: else
	fi
}

/* S9 */
inline stay() {
	i = kept[p];
	endMigration();
	if
	:: i == END && BELIEVED(cur[p] - 1) -> giveEnd()
	:: i == ERROR || i == END && !BELIEVED(cur[p] - 1) -> freeze()
	:: else
	fi;
	i = 0
}

inline readMove(s) {
	q[IN(s)]?MOVE,x,y;
	printf("%c: stream %d: reads Migrate, a migration's\n", NAME(p), s);
	if
	:: gone[p] || x != label[p] && att[p] == NOTHING && cur[p] != NOTHING && mig[p] == NONE ->
		send(s, DENY, 0, 0); letGo(s)
	:: else ->
		if
		:: cur[p] == NOTHING || att[p] != NOTHING || mig[p] >= ACKED || x != label[p] || mig[p] == ASKED && p == 0 ->
			reset(s, RESET_LOST)
		:: else ->
			if
			:: new[p] != NOTHING -> reset(new[p] - 1, RESET_LOST)	/* M1 */
			:: else
			fi;
			mig[p] = ACKED; new[p] = s + 1; label[p] = y;
			send(s, MOVE_ACK, y, 0);
			if
			:: TOO_EARLY -> send(cur[p] - 1, MOVE_FIN, 0, 0)
			:: else
			fi
		fi
	fi;
	x = 0; y = 0
}

inline readNew(s) {
	if
	:: HAS(s, MOVE_ACK) -> q[IN(s)]?MOVE_ACK,x,_; label[p] = x; x = 0; switchSending()
	:: HAS(s, DENY) -> q[IN(s)]?DENY,_,_; letGo(s); new[p] = NOTHING; stay()
	:: else ->
		q[IN(s)]?SIZE,x,_;
		printf("%c: stream %d: reads FinalSize(%d)\n", NAME(p), s, x);
		goal[p] = x + 1; x = 0;
		if
		:: mig[p] == ACKED -> switchSending()
		:: else
		fi;
		settle()
	fi
}

inline readOld(s) {
	if
	:: HAS(s, DATA) ->
		q[IN(s)]?DATA,x,_;
		printf("%c: stream %d: reads byte %d\n", NAME(p), s, x);
		assert(kept[p] == NONE);	/* a byte behind an end */
		readByte()
	:: else ->
		q[IN(s)]?_,_,_;
		printf("%c: stream %d: reads EOF, keeps it back\n", NAME(p), s);
		if
		:: kept[p] == NONE -> kept[p] = END
		:: else
		fi
	fi;
	settle()
}

inline readByte() {
	if
	:: !deaf[p] ->
		assert(x == got[p] + 1 && !atEnd[p]);	/* VIOLATED: a byte was lost, doubled or out of order */
		got[p] = x
	:: else
	fi;
	x = 0
}

inline readMessage(s) {
	if
	:: att[p] == s + 1 -> readAnswer(s)
	:: new[p] == s + 1 -> readNew(s)
	:: cur[p] == s + 1 && mig[p] != NONE -> readOld(s)
	:: cur[p] == s + 1 && mig[p] == NONE ->
		if
		:: HAS(s, DATA) ->
			q[IN(s)]?DATA,x,_;
			printf("%c: stream %d: reads byte %d\n", NAME(p), s, x);
			readByte()
		:: else ->
			q[IN(s)]?_,_,_;
			printf("%c: stream %d: reads EOF\n", NAME(p), s);
			judgeEnd(s, false)
		fi
	:: else ->
		if
		:: HAS(s, MIGRATE) -> readMigrate(s)
		:: HAS(s, MOVE) -> readMove(s)
		:: else -> letGo(s)
		fi
	fi
}

inline readError(s) {
	printf("%c: stream %d: reads %e\n", NAME(p), s, (flow[IN(s)] == DEAD -> error : (flow[IN(s)] == RESET_LOST -> reset_by_protocol : reset_for_good)));
	if
	:: att[p] == s + 1 ->
		if
		:: FINAL(s) -> att[p] = NOTHING; letGo(s); fail()
		:: else -> dropAttempt(RESET_LOST)
		fi
	:: new[p] == s + 1 ->
		if
		:: FINAL(s) -> letGo(s); new[p] = NOTHING; fail()
		:: else ->
			if
			:: mig[p] == ASKED -> reset(s, RESET_LOST); new[p] = NOTHING; stay()
			:: else -> freeze()
			fi
		fi
	:: cur[p] == s + 1 ->
		if
		:: FINAL(s) -> cur[p] = NOTHING; letGo(s); fail()
		:: else ->
			if
			:: IGNORES -> letGo(s)
			:: !IGNORES && (mig[p] == NONE || flow[IN(s)] == RESET_LOST) -> freeze()
			:: else ->
				kept[p] = ERROR; discard(s); settle()
			fi
		fi
	:: else -> letGo(s)	/* it has never been seen, or is not needed any more */
	fi
}

#define MAY_TELL	(!told[p] && !atEnd[p] && !gone[p] && !deaf[p] && ended[1 - p] && !gone[1 - p])
#define CAN_OPEN	(p == 0 -> OPENS_A : OPENS_B)
#define MAY_ATTEMPT	(NEEDS(p) && att[p] == NOTHING && LOST && !waits[p])

#define UNTOLD(p)	(app[p] == OPEN && !gone[p] && !DONE(p) && (app[1 - p] == FAILED || app[1 - p] == RESET))
#define LACKS(p)	(app[p] == OPEN && !gone[p] && !deaf[p] && app[1 - p] < RESET && (got[p] != wrote[1 - p] || atEnd[p] != ended[1 - p]))
#define MIGRATES(p)	(mig[p] != NONE && !gone[1 - p])
#define APART		(NEEDS(0) && NEEDS(1) && app[0] == OPEN && app[1] == OPEN && (cur[0] == NOTHING || cur[0] != cur[1]))

proctype peer(bit p) {
	byte i, k, x, y;
	do
	:: atomic {
		if
		:: READABLE(0) -> k = 0
		:: READABLE(1) -> k = 1
		:: READABLE(2) -> k = 2
		:: READABLE(3) -> k = 3
		:: READABLE(4) -> k = 4
		fi;
		if
		:: d_step { nempty(q[IN(k)]) && !KEPT_BACK(k) && !WAITING(k) -> readMessage(k) }
		:: d_step { CUT(k) && !NOTED(k) -> readError(k) }
#if LIES
		:: d_step { flow[IN(k)] == DEAD && cur[p] == k + 1 && mig[p] == NONE ->
			printf("%c: stream %d: reads a false EOF\n", NAME(p), k); judgeEnd(k, false) }
		:: d_step { flow[IN(k)] == DEAD && cur[p] == k + 1 && mig[p] != NONE && kept[p] == NONE ->
			printf("%c: stream %d: reads a false EOF, keeps it back\n", NAME(p), k); kept[p] = END; discard(k); settle() }
#endif
#if RACES
		:: d_step { flow[IN(k)] == DEAD && cur[p] == k + 1 && mig[p] == NONE && (TOLD < 2 || told[p]) ->
			printf("%c: stream %d: reads a false EOF, and the connection looks open\n", NAME(p), k); judgeEnd(k, true) }
#endif
		fi;
		k = 0 }
	:: d_step { CAN_OPEN && MAY_ATTEMPT -> unused(); attempt(k); k = 0 }
	:: d_step { !CAN_OPEN && MAY_ATTEMPT && cur[p] != NOTHING -> freeze() }
	:: d_step { NEEDS(p) && waits[p] && LOST && att[1 - p] == NOTHING ->
		printf("%c: has waited long enough\n", NAME(p)); waits[p] = false }
	/* R8: a tombstone, all of which is confirmed, leaves its stream to the muxer */
	:: d_step { !gone[p] && app[p] == CLOSED && mig[p] == NONE && LETS_GO ->
		if
		:: cur[p] != NOTHING -> letGo(cur[p] - 1); cur[p] = NOTHING
		:: else
		fi;
		finish(CLOSED) }
	:: d_step { TOLD == 2 && MAY_TELL -> told[p] = true; printf("%c: is told of the other's end\n", NAME(p)) }
	/* ---- after the run ---- */

	:: atomic { calm ->
		judged = true;
		assert(!UNTOLD(0) && !UNTOLD(1));	/* VIOLATED: one has given up, and the other is not told */
		assert(!LACKS(0) && !LACKS(1) && !MIGRATES(0) && !MIGRATES(1) && !APART);	/* VIOLATED: the two do not come together */
#if REACH
		assert(!(resumed >= REACH && atEnd[0] && atEnd[1] && got[0] == KB && got[1] == KA && confirmed[0] && cur[0] == cur[1]));	/* REACHED: the stream outlives its connections */
#endif
		break }
	od
}

/* What comes from the application goes to the stream that it is on, if there is one. */
inline write(message, v) {
	if
	:: mig[p] == SWITCHED -> send(new[p] - 1, message, v, 0)
	:: mig[p] != SWITCHED && cur[p] != NOTHING -> send(cur[p] - 1, message, v, 0)
	:: else
	fi
}

inline endWriting() {
	if
	:: !ended[p] -> ended[p] = true; write(FIN, 0)
	:: else
	fi
}

inline dies(s) {
	dead[s] = true;
	i = 0;
	do
	:: i < 2 ->
		if
		:: flow[2 * s + i] == FLOWS -> flow[2 * s + i] = DEAD
		:: else
		fi;
		i++
	:: i == 2 -> break
	od;
	i = 0
}

#define ACTIVE	(!calm && app[p] == OPEN)

proctype user(bit p) {
	byte i, k, x;
	do
	:: d_step { ACTIVE && !ended[p] && wrote[p] < (p == 0 -> KA : KB) && (cur[p] != NOTHING || wrote[p] - MIN(confirmed[p], wrote[p]) < RING) ->
		wrote[p]++;
		printf("%c: application: writes byte %d\n", NAME(p), wrote[p]);
		write(DATA, wrote[p]) }
	:: d_step { ACTIVE && !ended[p] ->
		printf("%c: application: ends its writing\n", NAME(p)); endWriting() }
#if CLOSE_READ
	:: d_step { ACTIVE && !deaf[p] && !atEnd[p] ->
		printf("%c: application: closes its reading\n", NAME(p)); deaf[p] = true; told[p] = false }
#endif
#if CLOSES
	:: d_step { ACTIVE ->
		printf("%c: application: closes the stream\n", NAME(p));
		endWriting(); deaf[p] = true; told[p] = false; app[p] = CLOSED }
#endif
#if RESETS
	:: d_step { ACTIVE -> printf("%c: application: resets the stream\n", NAME(p)); finish(RESET) }
#endif
#if PURPOSE
	:: d_step { ACTIVE && cur[p] != NOTHING && !dead[cur[p] - 1] ->
		printf("%c: closes the connection for good, and the reason is lost\n", NAME(p));
		x = cur[p] - 1;
		finish(RESET);
		dead[x] = true;
		if
		:: flow[OUT(x)] == RESET_FINAL -> flow[OUT(x)] = DEAD
		:: else
		fi;
		x = 0 }
#endif
#if RESTARTS
	:: d_step { ACTIVE ->
		printf("%c: restarts\n", NAME(p));
		do
		:: x < STREAMS ->
			if
			:: !FREE(x) -> dies(x); letGo(x)
			:: else
			fi;
			x++
		:: x == STREAMS -> break
		od;
		x = 0; cur[p] = NOTHING; att[p] = NOTHING;
		finish(RESET) }
#endif
#if PATIENCE_ENDS
	:: d_step { !calm && !gone[p] && (cur[p] == NOTHING || att[p] != NOTHING || app[p] == CLOSED) ->
		printf("%c: T has passed\n", NAME(p));
		if
		:: app[p] == CLOSED && cur[p] != NOTHING && mig[p] == NONE -> letGo(cur[p] - 1); cur[p] = NOTHING
		:: else
		fi;
		fail() }
#endif
#if TIMEOUTS
	:: d_step { !calm && faults > 0 && att[p] != NOTHING ->
		printf("%c: stream %d: no answer in time\n", NAME(p), att[p] - 1);
		faults--; dropAttempt(RESET_LOST) }
	:: d_step { !calm && faults > 0 && NEEDS(p) && waits[p] && LOST && att[1 - p] != NOTHING ->
		printf("%c: waits no longer\n", NAME(p));
		faults--; waits[p] = false }
#endif
#if SILENT
	:: d_step { !calm && faults > 0 && NEEDS(p) && att[p] == NOTHING && !LOST && !waits[p] && CAN_OPEN ->
		printf("%c: holds stream %d for silent\n", NAME(p), cur[p] - 1);
		faults--;
		unused(); attempt(k); k = 0 }
#endif
#if MIGRATIONS
	:: d_step { !calm && migrations > 0 && !gone[p] && cur[p] != NOTHING && att[p] == NOTHING && mig[p] == NONE && !dead[cur[p] - 1] ->
		unused();
		mig[p] = ASKED; new[p] = k + 1;
		flow[2 * k] = FLOWS; flow[2 * k + 1] = FLOWS; dead[k] = false;
		printf("%c: stream %d: Migrate, a migration's\n", NAME(p), k);
		i = label[p]; x = 1 + 2 * migrations + p;
		send(k, MOVE, i, x);
		migrations--; i = 0; k = 0; x = 0 }
#endif
	/* R12: what was received is confirmed, sooner or later or never */
	:: d_step { !calm && !gone[p] && !gone[1 - p] && confirmed[p] < got[1 - p] + (THE_END && atEnd[1 - p]) ->
		confirmed[p]++;
		printf("%c: gets a confirmation of %d\n", NAME(p), confirmed[p]) }
	:: d_step { !calm && !gone[p] && !gone[1 - p] && confirmed[p] < ALL && deaf[1 - p] ->
		confirmed[p] = ALL;
		printf("%c: gets a confirmation of all\n", NAME(p)) }
#if TOLD == 1
	:: d_step { !calm && MAY_TELL -> told[p] = true; printf("%c: is told of the other's end\n", NAME(p)) }
#endif
	:: calm -> break
	od
}

proctype world() {
	byte i, s;
	do
	:: d_step { faults > 0 && !calm && !dead[0] && !FREE(0) -> printf("stream 0: the connection dies\n"); faults--; dies(0) }
	:: d_step { faults > 0 && !calm && !dead[1] && !FREE(1) -> printf("stream 1: the connection dies\n"); faults--; dies(1) }
	:: d_step { faults > 0 && !calm && !dead[2] && !FREE(2) -> printf("stream 2: the connection dies\n"); faults--; dies(2) }
	:: d_step { faults > 0 && !calm && !dead[3] && !FREE(3) -> printf("stream 3: the connection dies\n"); faults--; dies(3) }
	:: d_step { faults > 0 && !calm && !dead[4] && !FREE(4) -> printf("stream 4: the connection dies\n"); faults--; dies(4) }
	:: atomic { !enabled(1) && !enabled(2) -> calm = true; break }	/* nothing more happens by itself */
	od
}

init {
	atomic {
		flow[2] = LET_GO; flow[3] = LET_GO; flow[4] = LET_GO; flow[5] = LET_GO;
		flow[6] = LET_GO; flow[7] = LET_GO; flow[8] = LET_GO; flow[9] = LET_GO;
		cur[0] = 1; cur[1] = 1;
		run peer(0); run peer(1); run user(0); run user(1); run world()
	}
}
