-- Runs that are parked in the middle, checkpoints to go on from, what operators asked of the fleet, and what
-- was learned about how long jobs take.

ALTER TABLE scheduler.attempt
    DROP CONSTRAINT attempt_state_check,
    -- migrated: another attempt goes on with its run on another worker.
    ADD CONSTRAINT attempt_state_check
        CHECK (state IN ('running', 'succeeded', 'failed', 'cancelled', 'lost', 'migrated')),
    -- Since when its GPU is another's; absent while it has one.
    ADD COLUMN parked_at timestamptz,
    ADD COLUMN parks smallint NOT NULL DEFAULT 0 CHECK (parks >= 0),
    -- How long it was parked before that: none of it is GPU time.
    ADD COLUMN parked_ms bigint NOT NULL DEFAULT 0 CHECK (parked_ms >= 0),
    -- It had its turn before fast, so it is not parked.
    ADD COLUMN sheltered boolean NOT NULL DEFAULT false,
    -- The attempt whose run it goes on with, and whose charge it took over.
    ADD COLUMN migrated_from uuid REFERENCES scheduler.attempt,
    -- What the job's checkpoint had kept when it started; from its end on, the part of gpu_ms it went on with.
    ADD COLUMN kept_ms integer NOT NULL DEFAULT 0 CHECK (kept_ms >= 0);

-- A worker runs one attempt; others may be parked on it.
DROP INDEX scheduler.attempt_one_per_worker;
CREATE UNIQUE INDEX attempt_one_per_worker ON scheduler.attempt (worker_id)
    WHERE state = 'running' AND parked_at IS NULL;
-- Or deleting a job would look through all attempts for those that refer to its own.
CREATE INDEX attempt_by_migrated_from ON scheduler.attempt (migrated_from) WHERE migrated_from IS NOT NULL;

-- gpu_worker.contract.Checkpoint as JSON, the newest of any of its attempts. Its file ends with the job.
ALTER TABLE scheduler.job ADD COLUMN checkpoint jsonb;

ALTER TABLE scheduler.worker_slot
    ADD COLUMN draining boolean NOT NULL DEFAULT false,
    ADD COLUMN drain_reason text NOT NULL DEFAULT '';

ALTER TABLE scheduler.cell
    ADD COLUMN paused boolean NOT NULL DEFAULT false,
    ADD COLUMN pause_reason text NOT NULL DEFAULT '';

-- What jobs of one shape took on one device type: the sums that scheduler/estimator.py learns from.
CREATE TABLE scheduler.estimate (
    kind     text NOT NULL,
    model    text NOT NULL,
    width    integer NOT NULL,
    height   integer NOT NULL,
    steps    integer NOT NULL,
    device   text NOT NULL,
    -- Attempts counted, and exponentially weighted means: of a step, and of everything else in the attempt.
    seen     bigint NOT NULL CHECK (seen > 0),
    step_us  double precision NOT NULL CHECK (step_us >= 0),
    rest_us  double precision NOT NULL CHECK (rest_us >= 0),
    PRIMARY KEY (kind, model, width, height, steps, device)
);

-- What the board was told, in that order: what an auditor replays. Rows of jobs and attempts say what came of
-- it; the order in which the board heard of arrivals and ends, the size of the fleet at any time, limits,
-- parks and pauses are only here. Written about once a second, so a scheduler that died may owe its last
-- second; the next one begins with what it found.
CREATE TABLE scheduler.journal (
    epoch   bigint NOT NULL,
    number  bigint NOT NULL,
    at      timestamptz NOT NULL,
    -- A class of scheduler/policy/events.py or journal.py, and what it is about.
    kind    text NOT NULL,
    subject text NOT NULL,
    facts   jsonb NOT NULL,
    PRIMARY KEY (epoch, number)
);
CREATE INDEX journal_by_time ON scheduler.journal USING brin (at);
CREATE INDEX journal_by_subject ON scheduler.journal (subject, epoch, number);
-- The fleet and the tiers before a period: few lines among very many.
CREATE INDEX journal_of_cell ON scheduler.journal (kind, epoch, number)
    WHERE kind IN ('CellRestored', 'WorkerJoined', 'WorkerLost', 'WorkerDraining', 'WorkerResumed',
                   'TierPaused', 'TierResumed');
