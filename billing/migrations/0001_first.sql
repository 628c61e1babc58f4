-- The ledger's tables: plans and who is on them, lots of granted time, holds on them, and the journal.
--
-- Time is GPU milliseconds, money is millionths of a currency unit, multipliers are basis points; all are integers.
-- A constraint here is the last guard of a promise; what no constraint can say is in billing/invariants.py.

CREATE SCHEMA billing;

CREATE FUNCTION billing.refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'billing.% is append-only: correct it with a new row', TG_TABLE_NAME
        USING ERRCODE = 'restrict_violation';
END $$;

CREATE TABLE billing.account (
    account_id text PRIMARY KEY,
    created_at timestamptz NOT NULL
);

-- Who changed what, why, and how it was before and after.
CREATE TABLE billing.audit_event (
    audit_id   bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    at         timestamptz NOT NULL,
    actor      text NOT NULL CHECK (actor <> ''),
    action     text NOT NULL CHECK (action <> ''),
    -- Resource name of what was changed: accounts/…, plans/….
    target     text NOT NULL CHECK (target <> ''),
    reason     text NOT NULL CHECK (reason <> ''),
    request_id text NOT NULL CHECK (request_id <> ''),
    before     jsonb,
    after      jsonb
);
-- An adjustment that takes time away makes no lot whose key could refuse its repetition.
CREATE UNIQUE INDEX audit_event_adjusts_once ON billing.audit_event (target, request_id) WHERE action = 'AdjustBalance';
CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON billing.audit_event
    FOR EACH STATEMENT EXECUTE FUNCTION billing.refuse_change();

-- Changing a plan inserts a version. The row of version 1 is also the plan's lock.
CREATE TABLE billing.plan_version (
    plan                      text NOT NULL CHECK (plan <> ''),
    version                   integer NOT NULL CHECK (version > 0),
    quota_ms                  bigint NOT NULL CHECK (quota_ms >= 0),
    limit_running             integer NOT NULL CHECK (limit_running > 0),
    limit_relax_running       integer NOT NULL CHECK (limit_relax_running >= 0),
    limit_accepted            integer NOT NULL CHECK (limit_accepted > 0),
    relax_weight_milli        integer NOT NULL CHECK (relax_weight_milli > 0),
    private_allowed           boolean NOT NULL,
    private_multiplier_bp     integer NOT NULL CHECK (private_multiplier_bp > 0),
    -- 0: no overage on this plan.
    overage_micros_per_minute bigint NOT NULL CHECK (overage_micros_per_minute >= 0),
    currency                  text NOT NULL CHECK (currency ~ '^[A-Z]{3}$'),
    -- Subscribers take it up at their next touch; otherwise with their first period that starts after it was made.
    at_once                   boolean NOT NULL,
    created_at                timestamptz NOT NULL,
    audit_id                  bigint NOT NULL REFERENCES billing.audit_event,
    PRIMARY KEY (plan, version)
);
CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON billing.plan_version
    FOR EACH STATEMENT EXECUTE FUNCTION billing.refuse_change();

-- One per account. Its row is the account's lock: whatever moves the account's time or money holds it.
CREATE TABLE billing.subscription (
    account_id       text PRIMARY KEY REFERENCES billing.account,
    plan             text NOT NULL,
    version          integer NOT NULL,
    -- Periods are counted in months from here, so that each keeps its day.
    anchor           timestamptz NOT NULL,
    -- The newest period whose lot exists.
    period_start     timestamptz NOT NULL,
    period_end       timestamptz NOT NULL CHECK (period_end > period_start),
    -- The account agreed to be charged beyond its quota.
    overage_allowed  boolean NOT NULL DEFAULT false,
    -- Most that may be charged so in a period; 0: no cap.
    spend_cap_micros bigint NOT NULL DEFAULT 0 CHECK (spend_cap_micros >= 0),
    FOREIGN KEY (plan, version) REFERENCES billing.plan_version
);

-- Time granted to an account from one source for one span.
CREATE TABLE billing.grant_lot (
    lot_id       bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    account_id   text NOT NULL REFERENCES billing.account,
    source       text NOT NULL CHECK (source IN ('plan', 'proration', 'promo', 'refund', 'admin', 'purchase')),
    -- What was granted once is not granted again.
    source_key   text NOT NULL,
    -- Smaller burns first; then what expires first, then what was made first.
    priority     smallint NOT NULL,
    effective_at timestamptz NOT NULL,
    expires_at   timestamptz,
    granted_ms   bigint NOT NULL CHECK (granted_ms >= 0),
    used_ms      bigint NOT NULL DEFAULT 0 CHECK (used_ms >= 0),
    held_ms      bigint NOT NULL DEFAULT 0 CHECK (held_ms >= 0),
    expired_ms   bigint NOT NULL DEFAULT 0 CHECK (expired_ms >= 0),
    revoked_ms   bigint NOT NULL DEFAULT 0 CHECK (revoked_ms >= 0),
    CONSTRAINT grant_lot_granted_once UNIQUE (source_key),
    CONSTRAINT grant_lot_not_overdrawn CHECK (used_ms + held_ms + expired_ms + revoked_ms <= granted_ms),
    CHECK (expires_at > effective_at),
    CHECK (source <> 'plan' OR expires_at IS NOT NULL)
);
CREATE INDEX grant_lot_by_account ON billing.grant_lot (account_id, expires_at);
CREATE UNIQUE INDEX grant_lot_one_a_period ON billing.grant_lot (account_id, effective_at) WHERE source = 'plan';

-- Money of one account and period, for time beyond its lots.
CREATE TABLE billing.metered_account (
    account_id    text NOT NULL REFERENCES billing.account,
    period_start  timestamptz NOT NULL,
    currency      text NOT NULL,
    posted_micros bigint NOT NULL DEFAULT 0 CHECK (posted_micros >= 0),
    held_micros   bigint NOT NULL DEFAULT 0 CHECK (held_micros >= 0),
    PRIMARY KEY (account_id, period_start, currency)
);

-- The journal: each row moves an amount from the debited to the credited account.
-- Accounts: lot/<id> and metered/<account> have rows of their own; issued, platform, consumed, consumed_relax,
-- expired, revoked, absorbed and revenue are the sums of their rows here.
CREATE TABLE billing.transfer (
    transfer_id    bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    kind           text NOT NULL
                   CHECK (kind IN ('post', 'pending', 'post_pending', 'void_pending', 'expire_pending')),
    -- Why it was made.
    code           text NOT NULL CHECK (code IN ('period', 'plan_change', 'admin', 'hold', 'settle', 'overrun',
                                                 'metered_time', 'relax', 'absorbed')),
    account_id     text NOT NULL REFERENCES billing.account,
    job_id         uuid,
    attempt_id     uuid,
    leg            smallint NOT NULL DEFAULT 0,
    debit_account  text NOT NULL,
    credit_account text NOT NULL,
    -- gpu_ms, or the currency whose millionths are counted.
    unit           text NOT NULL,
    amount         bigint NOT NULL,
    lot_id         bigint REFERENCES billing.grant_lot,
    -- What this row ends.
    pending_id     bigint REFERENCES billing.transfer,
    audit_id       bigint REFERENCES billing.audit_event,
    at             timestamptz NOT NULL,
    CONSTRAINT transfer_amount_positive CHECK (amount > 0),
    CONSTRAINT transfer_sides_differ CHECK (debit_account <> credit_account),
    CONSTRAINT transfer_one_unit CHECK (
        (unit <> 'gpu_ms') = (credit_account = 'revenue') AND (unit <> 'gpu_ms') = (debit_account LIKE 'metered/%')),
    CONSTRAINT transfer_names_its_lot CHECK (
        COALESCE('lot/' || lot_id IN (debit_account, credit_account),
                 debit_account NOT LIKE 'lot/%' AND credit_account NOT LIKE 'lot/%')),
    CONSTRAINT transfer_resolves_a_pending CHECK (
        (kind IN ('post_pending', 'void_pending', 'expire_pending')) = (pending_id IS NOT NULL)),
    CONSTRAINT transfer_names_job_and_attempt CHECK (
        (job_id IS NULL) = (attempt_id IS NULL)
        AND (attempt_id IS NULL) = (code IN ('period', 'plan_change', 'admin'))),
    CONSTRAINT transfer_admin_is_audited CHECK ((code = 'admin') = (audit_id IS NOT NULL)),
    -- The constraint that forbids double billing.
    CONSTRAINT transfer_resolved_once UNIQUE (pending_id),
    CONSTRAINT transfer_once_an_attempt UNIQUE (job_id, attempt_id, code, leg)
);
CREATE INDEX transfer_by_account ON billing.transfer (account_id, at);
CREATE INDEX transfer_by_lot ON billing.transfer (lot_id, transfer_id);
CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON billing.transfer
    FOR EACH STATEMENT EXECUTE FUNCTION billing.refuse_change();

-- What was set aside for one attempt when it was dispatched, and the terms it was dispatched under.
CREATE TABLE billing.hold (
    -- UUIDv5 of job and attempt.
    hold_id                   uuid PRIMARY KEY,
    account_id                text NOT NULL REFERENCES billing.account,
    job_id                    uuid NOT NULL,
    attempt_id                uuid NOT NULL UNIQUE,
    state                     text NOT NULL DEFAULT 'open' CHECK (state IN ('open', 'posted', 'voided')),
    predicted_ms              bigint NOT NULL CHECK (predicted_ms > 0),
    multiplier_bp             integer NOT NULL CHECK (multiplier_bp > 0),
    lots_ms                   bigint NOT NULL CHECK (lots_ms >= 0),
    metered_ms                bigint NOT NULL CHECK (metered_ms >= 0),
    metered_micros            bigint NOT NULL CHECK (metered_micros >= 0),
    overage_allowed           boolean NOT NULL,
    overage_micros_per_minute bigint NOT NULL CHECK (overage_micros_per_minute >= 0),
    currency                  text NOT NULL,
    spend_cap_micros          bigint NOT NULL CHECK (spend_cap_micros >= 0),
    -- Period whose metered account it draws on.
    period_start              timestamptz NOT NULL,
    placed_at                 timestamptz NOT NULL,
    ended_at                  timestamptz,
    CONSTRAINT hold_covers_the_prediction CHECK (
        lots_ms + metered_ms = (predicted_ms * multiplier_bp + 9999) / 10000),
    CONSTRAINT hold_meters_by_consent CHECK (metered_ms = 0 OR overage_allowed),
    CONSTRAINT hold_price CHECK (metered_micros = (metered_ms * overage_micros_per_minute + 59999) / 60000),
    CHECK ((state = 'open') = (ended_at IS NULL))
);
CREATE UNIQUE INDEX hold_one_open_a_job ON billing.hold (job_id) WHERE state = 'open';
CREATE INDEX hold_open ON billing.hold (placed_at) WHERE state = 'open';

-- The parts of a hold in burn order: one for each lot, then at most one of money.
CREATE TABLE billing.hold_leg (
    hold_id    uuid NOT NULL REFERENCES billing.hold,
    leg        smallint NOT NULL,
    -- Absent: the metered leg.
    lot_id     bigint REFERENCES billing.grant_lot,
    held_ms    bigint NOT NULL CHECK (held_ms > 0),
    pending_id bigint NOT NULL UNIQUE REFERENCES billing.transfer,
    PRIMARY KEY (hold_id, leg)
);

-- The end of an attempt in the ledger. Its primary key is what makes a second end impossible, also where no
-- transfer was made.
CREATE TABLE billing.settlement (
    attempt_id    uuid PRIMARY KEY,
    job_id        uuid NOT NULL,
    account_id    text NOT NULL REFERENCES billing.account,
    tier          text NOT NULL CHECK (tier IN ('fast', 'relax')),
    ending        text NOT NULL CHECK (ending IN ('post', 'void')),
    -- Measured GPU time that was posted; a void posts none.
    measured_ms   bigint NOT NULL CHECK (measured_ms >= 0 AND (ending = 'post' OR measured_ms = 0)),
    multiplier_bp integer NOT NULL CHECK (multiplier_bp > 0),
    -- What that time costs.
    due_ms        bigint NOT NULL,
    -- What was charged of it: less where it ran beyond its hold and nothing was left to take.
    billed_ms     bigint NOT NULL,
    -- Measured time in `measured_ms` that nobody paid, for that reason.
    unpaid_ms     bigint NOT NULL,
    -- Measured time the platform bears: `unpaid_ms`, and what was lost by our fault.
    absorbed_ms   bigint NOT NULL,
    -- Charged in money, within `billed_ms`.
    amount_micros bigint NOT NULL CHECK (amount_micros >= 0),
    currency      text NOT NULL,
    at            timestamptz NOT NULL,
    CONSTRAINT settlement_due CHECK (
        due_ms = CASE WHEN tier = 'fast' THEN (measured_ms * multiplier_bp + 9999) / 10000 ELSE 0 END),
    CONSTRAINT settlement_bills_at_most_what_is_due CHECK (billed_ms BETWEEN 0 AND due_ms),
    CONSTRAINT settlement_unpaid CHECK (
        unpaid_ms = CASE WHEN tier = 'fast'
                         THEN measured_ms - LEAST(measured_ms, billed_ms * 10000 / multiplier_bp) ELSE 0 END),
    CHECK (absorbed_ms >= unpaid_ms)
);
-- A job is charged once, whatever becomes of its attempts.
CREATE UNIQUE INDEX settlement_one_charge_a_job ON billing.settlement (job_id) WHERE ending = 'post';
CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON billing.settlement
    FOR EACH STATEMENT EXECUTE FUNCTION billing.refuse_change();

-- Answers already given, by caller, method and request id.
CREATE TABLE billing.idempotency (
    account_id text NOT NULL,
    method     text NOT NULL,
    request_id text NOT NULL CHECK (request_id <> ''),
    input_hash bytea NOT NULL,
    -- Absent only inside the transaction that claims it.
    outcome    jsonb,
    PRIMARY KEY (account_id, method, request_id)
);

-- The plans of the first release. 66,667 micros a minute is 4 USD for a GPU-hour.
WITH audit AS (
    INSERT INTO billing.audit_event (at, actor, action, target, reason, request_id)
    SELECT '2026-01-01 00:00:00+00', 'release', 'CreatePlan', 'plans/' || plan, 'plan of the first release', 'first/' || plan
      FROM unnest(ARRAY['basic', 'standard', 'pro']) AS plan
    RETURNING audit_id, target, at
)
INSERT INTO billing.plan_version (
    plan, version, quota_ms, limit_running, limit_relax_running, limit_accepted, relax_weight_milli,
    private_allowed, private_multiplier_bp, overage_micros_per_minute, currency, at_once, created_at, audit_id)
SELECT plan, 1, quota_ms, 3, 2, 10, 1000, private_allowed, 20000, 66667, 'USD', false, audit.at, audit_id
  FROM (VALUES ('basic', 12000000, false), ('standard', 54000000, false), ('pro', 108000000, true))
       AS seed (plan, quota_ms, private_allowed)
  JOIN audit ON audit.target = 'plans/' || plan;
