-- Outside a transaction, so that requests are answered while the index is built; any statement can be repeated.
--
-- Plans say how long pictures are kept, and answers given are not remembered for ever.

ALTER TABLE billing.plan_version
    -- Days from the end of their job; 0: for ever, as on the plans there are.
    ADD COLUMN IF NOT EXISTS picture_retention_days integer NOT NULL DEFAULT 0
        CONSTRAINT plan_version_picture_retention_days_check CHECK (picture_retention_days >= 0);
-- Of what was answered before this release: the day it was installed.
ALTER TABLE billing.idempotency ADD COLUMN IF NOT EXISTS created_at timestamptz NOT NULL DEFAULT now();

DROP INDEX CONCURRENTLY IF EXISTS billing.idempotency_by_age;
CREATE INDEX CONCURRENTLY idempotency_by_age ON billing.idempotency (created_at);
