-- Refunds that are taken back; plans that accounts may take by themselves.

ALTER TABLE billing.plan_version
    -- An account may change to it without an admin. Not so for the plans there are: nobody had said it.
    ADD COLUMN self_service boolean NOT NULL DEFAULT false;

ALTER TABLE billing.transfer
    DROP CONSTRAINT transfer_code_check,
    ADD CONSTRAINT transfer_code_check CHECK (
        code IN ('period', 'rollover', 'expiry', 'plan_change', 'plan_undo', 'admin', 'promo', 'purchase', 'refund',
                 'refund_undo', 'hold', 'hold_expiry', 'settle', 'overrun', 'metered_time', 'relax', 'absorbed')),
    DROP CONSTRAINT transfer_admin_is_audited,
    ADD CONSTRAINT transfer_admin_is_audited CHECK (
        code = 'plan_change'
        OR (code IN ('plan_undo', 'admin', 'promo', 'purchase', 'refund', 'refund_undo')) = (audit_id IS NOT NULL));

-- What was taken back of a refund, which is possible once.
CREATE TABLE billing.refund_undo (
    refund_id    bigint PRIMARY KEY REFERENCES billing.refund,
    account_id   text NOT NULL REFERENCES billing.account ON UPDATE CASCADE,
    -- Charged again; what of the refund was used, held or gone by then is not.
    taken_ms     bigint NOT NULL CHECK (taken_ms >= 0),
    taken_micros bigint NOT NULL CHECK (taken_micros >= 0),
    audit_id     bigint NOT NULL UNIQUE REFERENCES billing.audit_event,
    at           timestamptz NOT NULL
);
CREATE INDEX refund_undo_by_account ON billing.refund_undo (account_id);
CREATE TRIGGER append_only BEFORE DELETE OR TRUNCATE ON billing.refund_undo
    FOR EACH STATEMENT EXECUTE FUNCTION billing.refuse_change();
CREATE TRIGGER append_only_but_for_erasure BEFORE UPDATE ON billing.refund_undo
    FOR EACH ROW EXECUTE FUNCTION billing.allow_only_a_pseudonym();
