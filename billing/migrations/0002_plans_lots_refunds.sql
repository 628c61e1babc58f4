-- Prices, rollover and GPU classes of plans; changes of plan; refunds; the end of lots; thresholds; erased accounts.

ALTER TABLE billing.plan_version
    -- Of a period.
    ADD COLUMN price_micros bigint NOT NULL DEFAULT 0 CHECK (price_micros >= 0),
    -- Most unused time of the plan that a period leaves to the next.
    ADD COLUMN rollover_ms bigint NOT NULL DEFAULT 0 CHECK (rollover_ms >= 0),
    -- Multipliers by device type; a type that is not named counts 10000.
    ADD COLUMN gpu_class_bp jsonb NOT NULL DEFAULT '{}' CHECK (jsonb_typeof(gpu_class_bp) = 'object');

ALTER TABLE billing.subscription
    -- Plan it changes to with its next period. Which version that is, the day it begins decides.
    ADD COLUMN scheduled_plan text,
    -- Its account was erased: it is renewed no more.
    ADD COLUMN ended_at timestamptz;
CREATE INDEX subscription_due ON billing.subscription (period_end) WHERE ended_at IS NULL;

ALTER TABLE billing.grant_lot
    DROP CONSTRAINT grant_lot_source_check,
    ADD CONSTRAINT grant_lot_source_check CHECK (
        source IN ('plan', 'proration', 'rollover', 'promo', 'refund', 'admin', 'purchase')),
    -- It is over, and all of it is used, expired or revoked. A column, because an index over the amounts would
    -- make every movement of a lot write to it.
    ADD COLUMN closed boolean NOT NULL DEFAULT false,
    ADD CONSTRAINT grant_lot_closed_is_empty CHECK (
        NOT closed OR (held_ms = 0 AND used_ms + expired_ms + revoked_ms = granted_ms));
CREATE INDEX grant_lot_open ON billing.grant_lot (expires_at) WHERE NOT closed;

-- Money moves between revenue and what an account owes: metered/<account> beyond its lots, subscription/<account>
-- for a change of plan.
ALTER TABLE billing.transfer
    DROP CONSTRAINT transfer_code_check,
    ADD CONSTRAINT transfer_code_check CHECK (
        code IN ('period', 'rollover', 'expiry', 'plan_change', 'admin', 'promo', 'purchase', 'refund',
                 'hold', 'settle', 'overrun', 'metered_time', 'relax', 'absorbed')),
    DROP CONSTRAINT transfer_one_unit,
    ADD CONSTRAINT transfer_one_unit CHECK (
        (unit <> 'gpu_ms') = (debit_account = 'revenue' OR debit_account LIKE 'metered/%'
                              OR debit_account LIKE 'subscription/%')
        AND (unit <> 'gpu_ms') = (credit_account = 'revenue' OR credit_account LIKE 'metered/%'
                                  OR credit_account LIKE 'subscription/%')),
    DROP CONSTRAINT transfer_names_job_and_attempt,
    ADD CONSTRAINT transfer_names_job_and_attempt CHECK (
        (job_id IS NULL) = (attempt_id IS NULL)
        AND (attempt_id IS NULL) = (code IN ('period', 'rollover', 'expiry', 'plan_change',
                                             'admin', 'promo', 'purchase'))),
    DROP CONSTRAINT transfer_admin_is_audited,
    -- A plan's new version moves time when the account is next touched, which is nobody's deed.
    ADD CONSTRAINT transfer_admin_is_audited CHECK (
        code = 'plan_change' OR (code IN ('admin', 'promo', 'purchase', 'refund')) = (audit_id IS NOT NULL));

-- Changes of an account, for its statements and for admins.
CREATE INDEX audit_event_by_target ON billing.audit_event (target, audit_id);

-- What was given back of an attempt's charge.
CREATE TABLE billing.refund (
    refund_id       bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    account_id      text NOT NULL REFERENCES billing.account ON UPDATE CASCADE,
    job_id          uuid NOT NULL,
    attempt_id      uuid NOT NULL REFERENCES billing.settlement,
    request_id      text NOT NULL CHECK (request_id <> ''),
    -- Absent: all that was left.
    asked_ms        bigint CHECK (asked_ms > 0),
    refunded_ms     bigint NOT NULL CHECK (refunded_ms > 0),
    -- Within `refunded_ms`, what had been charged in money.
    refunded_micros bigint NOT NULL CHECK (refunded_micros >= 0),
    currency        text NOT NULL,
    audit_id        bigint NOT NULL REFERENCES billing.audit_event,
    at              timestamptz NOT NULL,
    CONSTRAINT refund_once UNIQUE (account_id, request_id)
);
CREATE INDEX refund_by_attempt ON billing.refund (attempt_id);

-- Attempts whose hold was refused: asked again under the same id they are refused again, whatever was granted
-- since, because who was told may have acted on it.
CREATE TABLE billing.refused_hold (
    attempt_id uuid PRIMARY KEY,
    at         timestamptz NOT NULL
);

-- Shares of its fast time that an account had used up in a period, told once each.
CREATE TABLE billing.threshold_event (
    account_id   text NOT NULL REFERENCES billing.account ON UPDATE CASCADE,
    period_start timestamptz NOT NULL,
    percent      smallint NOT NULL CHECK (percent BETWEEN 1 AND 100),
    at           timestamptz NOT NULL,
    PRIMARY KEY (account_id, period_start, percent)
);

-- An account's id may be a name that somebody chose. Erasing the account gives it another everywhere, and that is
-- the one change which the journal and its companions allow: no amount, time or reference in them ever changes.
ALTER TABLE billing.account ADD COLUMN erased_at timestamptz;
ALTER TABLE billing.subscription
    DROP CONSTRAINT subscription_account_id_fkey,
    ADD FOREIGN KEY (account_id) REFERENCES billing.account ON UPDATE CASCADE;
ALTER TABLE billing.grant_lot
    DROP CONSTRAINT grant_lot_account_id_fkey,
    ADD FOREIGN KEY (account_id) REFERENCES billing.account ON UPDATE CASCADE;
ALTER TABLE billing.metered_account
    DROP CONSTRAINT metered_account_account_id_fkey,
    ADD FOREIGN KEY (account_id) REFERENCES billing.account ON UPDATE CASCADE;
ALTER TABLE billing.transfer
    DROP CONSTRAINT transfer_account_id_fkey,
    ADD FOREIGN KEY (account_id) REFERENCES billing.account ON UPDATE CASCADE;
ALTER TABLE billing.hold
    DROP CONSTRAINT hold_account_id_fkey,
    ADD FOREIGN KEY (account_id) REFERENCES billing.account ON UPDATE CASCADE;
ALTER TABLE billing.settlement
    DROP CONSTRAINT settlement_account_id_fkey,
    ADD FOREIGN KEY (account_id) REFERENCES billing.account ON UPDATE CASCADE;

CREATE FUNCTION billing.allow_only_a_pseudonym() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF OLD.account_id LIKE 'erased-%' OR NEW.account_id NOT LIKE 'erased-%'
       OR to_jsonb(NEW) - 'account_id' <> to_jsonb(OLD) - 'account_id' THEN
        RAISE EXCEPTION 'billing.% is append-only: correct it with a new row', TG_TABLE_NAME
            USING ERRCODE = 'restrict_violation';
    END IF;
    IF TG_TABLE_NAME = 'transfer' THEN
        -- The accounts of the ledger that are named after it.
        NEW.debit_account := regexp_replace(
            OLD.debit_account, '^(metered|subscription)/.*', '\1/' || NEW.account_id);
        NEW.credit_account := regexp_replace(
            OLD.credit_account, '^(metered|subscription)/.*', '\1/' || NEW.account_id);
    END IF;
    RETURN NEW;
END $$;

CREATE FUNCTION billing.allow_only_pseudonyms() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NEW IS NOT DISTINCT FROM OLD
       OR (NEW.actor <> OLD.actor AND NEW.actor NOT LIKE 'accounts/erased-%')
       OR (NEW.target <> OLD.target AND NEW.target NOT LIKE 'accounts/erased-%')
       OR to_jsonb(NEW) - '{actor,target}'::text[] <> to_jsonb(OLD) - '{actor,target}'::text[] THEN
        RAISE EXCEPTION 'billing.% is append-only: correct it with a new row', TG_TABLE_NAME
            USING ERRCODE = 'restrict_violation';
    END IF;
    RETURN NEW;
END $$;

DROP TRIGGER append_only ON billing.transfer;
CREATE TRIGGER append_only BEFORE DELETE OR TRUNCATE ON billing.transfer
    FOR EACH STATEMENT EXECUTE FUNCTION billing.refuse_change();
CREATE TRIGGER append_only_but_for_erasure BEFORE UPDATE ON billing.transfer
    FOR EACH ROW EXECUTE FUNCTION billing.allow_only_a_pseudonym();
DROP TRIGGER append_only ON billing.settlement;
CREATE TRIGGER append_only BEFORE DELETE OR TRUNCATE ON billing.settlement
    FOR EACH STATEMENT EXECUTE FUNCTION billing.refuse_change();
CREATE TRIGGER append_only_but_for_erasure BEFORE UPDATE ON billing.settlement
    FOR EACH ROW EXECUTE FUNCTION billing.allow_only_a_pseudonym();
CREATE TRIGGER append_only BEFORE DELETE OR TRUNCATE ON billing.refund
    FOR EACH STATEMENT EXECUTE FUNCTION billing.refuse_change();
CREATE TRIGGER append_only_but_for_erasure BEFORE UPDATE ON billing.refund
    FOR EACH ROW EXECUTE FUNCTION billing.allow_only_a_pseudonym();
DROP TRIGGER append_only ON billing.audit_event;
CREATE TRIGGER append_only BEFORE DELETE OR TRUNCATE ON billing.audit_event
    FOR EACH STATEMENT EXECUTE FUNCTION billing.refuse_change();
CREATE TRIGGER append_only_but_for_erasure BEFORE UPDATE ON billing.audit_event
    FOR EACH ROW EXECUTE FUNCTION billing.allow_only_pseudonyms();

-- Every hold and every charge moves a lot. With room in its page the new row stays there, and no index is written.
ALTER TABLE billing.grant_lot SET (fillfactor = 50);
-- What is open is found by hold_one_open_a_job as well, and each hold wrote to both.
DROP INDEX billing.hold_open;
