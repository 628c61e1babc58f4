-- The scheduler's tables. The ledger's are in schema billing, and are there before these.
--
-- Times are timestamptz; durations are integers of milliseconds; ids of jobs and attempts are UUIDs.

CREATE SCHEMA IF NOT EXISTS scheduler;

-- One row: who leads. A scheduler takes the lead by raising the epoch, and every batch it writes names its
-- epoch, so one that was replaced while it slept fails in the database instead of acting.
CREATE TABLE scheduler.leader (
    only_row    boolean PRIMARY KEY DEFAULT true CHECK (only_row),
    epoch       bigint NOT NULL DEFAULT 0,
    holder      text NOT NULL DEFAULT '',
    taken_at    timestamptz NOT NULL DEFAULT now(),
    -- The newest time any leader acted at; the next one never starts below it.
    last_now_ms bigint NOT NULL DEFAULT 0
);
INSERT INTO scheduler.leader DEFAULT VALUES;

-- What an account wants of the service. What it may do is in its plan.
CREATE TABLE scheduler.account (
    account_id  text PRIMARY KEY REFERENCES billing.account,
    mode        text NOT NULL DEFAULT 'fast' CHECK (mode IN ('fast', 'relax')),
    visibility  text NOT NULL DEFAULT 'public' CHECK (visibility IN ('public', 'private')),
    blocked     boolean NOT NULL DEFAULT false
);

CREATE TABLE scheduler.api_key (
    key_id      text PRIMARY KEY,
    account_id  text NOT NULL REFERENCES scheduler.account,
    -- SHA-256 of the secret, which is 256 random bits: a slow hash would guard nothing and cost every call.
    secret_hash bytea NOT NULL,
    role        text NOT NULL CHECK (role IN ('user', 'moderator', 'operator', 'admin')),
    created_at  timestamptz NOT NULL DEFAULT now(),
    revoked_at  timestamptz
);
CREATE INDEX api_key_by_account ON scheduler.api_key (account_id);

CREATE TABLE scheduler.moderation_rule (
    pattern     text PRIMARY KEY,
    category    text NOT NULL CHECK (category IN ('gore', 'adult', 'harassment')),
    created_at  timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE scheduler.job (
    job_id        uuid PRIMARY KEY,
    -- Order of arrival. Commits land out of order, so it orders jobs and finds none: sweeps use noticed_epoch.
    arrival       bigint GENERATED ALWAYS AS IDENTITY,
    account_id    text NOT NULL REFERENCES scheduler.account,
    kind          text NOT NULL CHECK (kind IN ('imagine', 'variation', 'reroll')),
    tier          text NOT NULL CHECK (tier IN ('fast', 'relax')),
    visibility    text NOT NULL CHECK (visibility IN ('public', 'private')),
    state         text NOT NULL DEFAULT 'queued'
                  CHECK (state IN ('queued', 'running', 'succeeded', 'failed', 'cancelled')),
    -- The prompt as given, parameters included.
    prompt        text NOT NULL,
    seed_fixed    boolean NOT NULL,
    -- gpu_worker.contract.RenderSpec as JSON.
    spec          jsonb NOT NULL,
    -- billing.prices.PricingSnapshot as JSON, fixed at acceptance.
    pricing       jsonb NOT NULL,
    predicted_ms  integer NOT NULL CHECK (predicted_ms > 0),
    source_job_id uuid REFERENCES scheduler.job,
    source_image  smallint CHECK (source_image BETWEEN 1 AND 4),
    warnings      text[] NOT NULL DEFAULT '{}',
    -- The owner wants it cancelled; the worker answers at its next step.
    cancel_wanted boolean NOT NULL DEFAULT false,
    losses        smallint NOT NULL DEFAULT 0,
    -- Epoch of the scheduler that has it on its board. The sweep looks for waiting rows without the present one.
    noticed_epoch bigint NOT NULL DEFAULT 0,
    event_seq     bigint NOT NULL DEFAULT 0,
    created_at    timestamptz NOT NULL DEFAULT now(),
    started_at    timestamptz,
    ended_at      timestamptz,
    -- Pictures, receipt and failure, once it has ended.
    images        jsonb,
    latents_path  text,
    receipt       jsonb,
    failure_reason   text,
    failure_sentence text,
    CHECK ((state IN ('queued', 'running')) = (ended_at IS NULL)),
    CHECK ((state = 'succeeded') = (images IS NOT NULL)),
    CHECK ((state = 'failed') = (failure_reason IS NOT NULL))
);
CREATE INDEX job_live ON scheduler.job (account_id) WHERE state IN ('queued', 'running');
CREATE INDEX job_waiting ON scheduler.job (noticed_epoch) WHERE state = 'queued';
-- Cancelled while it waited, and its notice may be lost: the board may still have it.
CREATE INDEX job_withdrawn ON scheduler.job (job_id) WHERE state = 'cancelled' AND noticed_epoch = 0;
CREATE INDEX job_running ON scheduler.job (job_id) WHERE state = 'running';
CREATE INDEX job_by_account ON scheduler.job (account_id, arrival DESC);
CREATE INDEX job_feed ON scheduler.job (ended_at DESC, job_id) WHERE state = 'succeeded' AND visibility = 'public';

-- What happened to each job, for whoever watches. A watch resumes after the last number it saw.
CREATE TABLE scheduler.job_event (
    seq      bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    job_id   uuid NOT NULL REFERENCES scheduler.job ON DELETE CASCADE,
    at       timestamptz NOT NULL DEFAULT now(),
    state    text NOT NULL CHECK (state IN ('queued', 'running', 'succeeded', 'failed', 'cancelled')),
    sentence text NOT NULL DEFAULT ''
);
CREATE INDEX job_event_by_job ON scheduler.job_event (job_id, seq);
-- A job ends once.
CREATE UNIQUE INDEX job_event_one_end ON scheduler.job_event (job_id)
    WHERE state IN ('succeeded', 'failed', 'cancelled');

CREATE TABLE scheduler.attempt (
    attempt_id    uuid PRIMARY KEY,
    job_id        uuid NOT NULL REFERENCES scheduler.job ON DELETE CASCADE,
    number        smallint NOT NULL CHECK (number > 0),
    -- The fence: a result counts only with the token of a running attempt.
    token         uuid NOT NULL,
    epoch         bigint NOT NULL,
    worker_id     text NOT NULL,
    incarnation   text NOT NULL,
    state         text NOT NULL DEFAULT 'running'
                  CHECK (state IN ('running', 'succeeded', 'failed', 'cancelled', 'lost')),
    started_at    timestamptz NOT NULL,
    ended_at      timestamptz,
    predicted_ms  integer NOT NULL,
    -- What the fair queue charged at dispatch, to correct it by the measured time at the end.
    charged_at_ms bigint NOT NULL,
    weight_milli  integer NOT NULL CHECK (weight_milli > 0),
    -- The numbers that were compared when it was chosen: the answer to "why did she go first?".
    decision      jsonb NOT NULL,
    gpu_ms        integer CHECK (gpu_ms >= 0),
    times         jsonb,
    UNIQUE (job_id, number),
    CHECK ((state = 'running') = (ended_at IS NULL))
);
CREATE UNIQUE INDEX attempt_one_running ON scheduler.attempt (job_id) WHERE state = 'running';
CREATE UNIQUE INDEX attempt_one_per_worker ON scheduler.attempt (worker_id) WHERE state = 'running';

-- The fair queue's memory of each account, per tier (POLICY: tags and usage). Tags are GPU microseconds per
-- unit of weight; usage is GPU milliseconds, scaled forward to the decay origin of its cell.
CREATE TABLE scheduler.fair_share (
    account_id  text NOT NULL REFERENCES scheduler.account,
    tier        text NOT NULL CHECK (tier IN ('fast', 'relax')),
    finish_tag  bigint NOT NULL DEFAULT 0,
    -- Start tag of the next job; absent while the account is not eligible.
    tag         bigint,
    usage       double precision NOT NULL DEFAULT 0 CHECK (usage >= 0 AND usage < 'Infinity'),
    -- Usage from before the present subscription period counts no more.
    usage_since timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (account_id, tier)
);

-- Virtual time of each tier and the origin of its forward decay.
CREATE TABLE scheduler.cell (
    tier            text PRIMARY KEY CHECK (tier IN ('fast', 'relax')),
    virtual_time    bigint NOT NULL DEFAULT 0,
    decay_origin_ms bigint NOT NULL DEFAULT 0
);
INSERT INTO scheduler.cell (tier) VALUES ('fast'), ('relax');

-- What is known of each slot beyond the life of its process.
CREATE TABLE scheduler.worker_slot (
    worker_id       text PRIMARY KEY,
    -- Different jobs lost in a row; three set the slot aside for a while.
    losses_in_row   smallint NOT NULL DEFAULT 0,
    last_lost_job   uuid,
    set_aside_until timestamptz
);
