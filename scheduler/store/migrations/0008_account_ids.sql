-- An account that is erased gets another id, which its jobs and its place in the queue follow.

ALTER TABLE scheduler.account
    DROP CONSTRAINT account_account_id_fkey,
    ADD FOREIGN KEY (account_id) REFERENCES billing.account ON UPDATE CASCADE;
ALTER TABLE scheduler.api_key
    DROP CONSTRAINT api_key_account_id_fkey,
    ADD FOREIGN KEY (account_id) REFERENCES scheduler.account ON UPDATE CASCADE;
ALTER TABLE scheduler.job
    DROP CONSTRAINT job_account_id_fkey,
    ADD FOREIGN KEY (account_id) REFERENCES scheduler.account ON UPDATE CASCADE;
ALTER TABLE scheduler.fair_share
    DROP CONSTRAINT fair_share_account_id_fkey,
    ADD FOREIGN KEY (account_id) REFERENCES scheduler.account ON UPDATE CASCADE;
