
-- It is to be erased: its jobs are deleted as they end, and then it gets its other id.
ALTER TABLE scheduler.account ADD COLUMN erasing boolean NOT NULL DEFAULT false;
CREATE INDEX account_erasing ON scheduler.account (account_id) WHERE erasing;
