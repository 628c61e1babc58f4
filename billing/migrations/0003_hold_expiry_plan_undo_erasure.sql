-- Holds that expire; changes of plan that can be taken back; indexes for what the erasure of an account changes.

ALTER TABLE billing.hold
    DROP CONSTRAINT hold_state_check,
    ADD CONSTRAINT hold_state_check CHECK (state IN ('open', 'posted', 'voided', 'expired')),
    -- From then on it is ended by who sweeps, unless its attempt runs: then it is put off. No index: what is open is
    -- found by hold_one_open_a_job. Those placed before this release are due, and so looked at, at once.
    ADD COLUMN stands_until timestamptz NOT NULL DEFAULT '-infinity';
ALTER TABLE billing.hold ALTER COLUMN stands_until DROP DEFAULT;

ALTER TABLE billing.transfer
    DROP CONSTRAINT transfer_code_check,
    ADD CONSTRAINT transfer_code_check CHECK (
        code IN ('period', 'rollover', 'expiry', 'plan_change', 'plan_undo', 'admin', 'promo', 'purchase', 'refund',
                 'hold', 'hold_expiry', 'settle', 'overrun', 'metered_time', 'relax', 'absorbed')),
    ADD CONSTRAINT transfer_hold_expires CHECK ((kind = 'expire_pending') = (code = 'hold_expiry')),
    DROP CONSTRAINT transfer_names_job_and_attempt,
    ADD CONSTRAINT transfer_names_job_and_attempt CHECK (
        (job_id IS NULL) = (attempt_id IS NULL)
        AND (attempt_id IS NULL) = (code IN ('period', 'rollover', 'expiry', 'plan_change', 'plan_undo',
                                             'admin', 'promo', 'purchase'))),
    DROP CONSTRAINT transfer_admin_is_audited,
    ADD CONSTRAINT transfer_admin_is_audited CHECK (
        code = 'plan_change'
        OR (code IN ('plan_undo', 'admin', 'promo', 'purchase', 'refund')) = (audit_id IS NOT NULL));

-- Changes of an account's plan that counted at once, and what took them back.
CREATE TABLE billing.plan_change (
    change_id     bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    account_id    text NOT NULL REFERENCES billing.account ON UPDATE CASCADE,
    from_plan     text NOT NULL,
    from_version  integer NOT NULL,
    to_plan       text NOT NULL,
    to_version    integer NOT NULL,
    period_start  timestamptz NOT NULL,
    -- Fast time it added to the period; negative: what an undo took of it.
    granted_ms    bigint NOT NULL,
    -- Of the old price given back, and of the new one charged.
    credit_micros bigint NOT NULL CHECK (credit_micros <= 0),
    charge_micros bigint NOT NULL CHECK (charge_micros >= 0),
    currency      text NOT NULL,
    -- The change that this one takes back, which is possible once.
    undoes        bigint REFERENCES billing.plan_change,
    audit_id      bigint NOT NULL UNIQUE REFERENCES billing.audit_event,
    at            timestamptz NOT NULL,
    CONSTRAINT plan_change_undone_once UNIQUE (undoes),
    FOREIGN KEY (from_plan, from_version) REFERENCES billing.plan_version,
    FOREIGN KEY (to_plan, to_version) REFERENCES billing.plan_version,
    CHECK (CASE WHEN undoes IS NULL THEN granted_ms >= 0 ELSE granted_ms <= 0 END)
);
CREATE INDEX plan_change_by_account ON billing.plan_change (account_id, change_id);
CREATE TRIGGER append_only BEFORE DELETE OR TRUNCATE ON billing.plan_change
    FOR EACH STATEMENT EXECUTE FUNCTION billing.refuse_change();
CREATE TRIGGER append_only_but_for_erasure BEFORE UPDATE ON billing.plan_change
    FOR EACH ROW EXECUTE FUNCTION billing.allow_only_a_pseudonym();

-- Those of the day before are forgotten, every minute.
CREATE INDEX refused_hold_by_age ON billing.refused_hold (at);

-- Every table that names accounts is searched when one gets its other name.
CREATE INDEX hold_by_account ON billing.hold (account_id);
CREATE INDEX settlement_by_account ON billing.settlement (account_id);
DROP INDEX billing.audit_event_by_target;
CREATE INDEX audit_event_by_target ON billing.audit_event (target text_pattern_ops, audit_id);
CREATE INDEX audit_event_by_actor ON billing.audit_event (actor text_pattern_ops, audit_id);

-- As before, and in half the time: an account may have a million entries.
CREATE OR REPLACE FUNCTION billing.allow_only_a_pseudonym() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    pseudonym text := NEW.account_id;
BEGIN
    NEW.account_id := OLD.account_id;
    IF OLD.account_id LIKE 'erased-%' OR pseudonym NOT LIKE 'erased-%' OR NEW IS DISTINCT FROM OLD THEN
        RAISE EXCEPTION 'billing.% is append-only: correct it with a new row', TG_TABLE_NAME
            USING ERRCODE = 'restrict_violation';
    END IF;
    NEW.account_id := pseudonym;
    IF TG_TABLE_NAME = 'transfer' THEN
        -- The accounts of the ledger that are named after it.
        IF OLD.debit_account IN ('metered/' || OLD.account_id, 'subscription/' || OLD.account_id) THEN
            NEW.debit_account := split_part(OLD.debit_account, '/', 1) || '/' || pseudonym;
        END IF;
        IF OLD.credit_account IN ('metered/' || OLD.account_id, 'subscription/' || OLD.account_id) THEN
            NEW.credit_account := split_part(OLD.credit_account, '/', 1) || '/' || pseudonym;
        END IF;
    END IF;
    RETURN NEW;
END $$;
