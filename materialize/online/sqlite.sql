-- The tables of an online store in SQLite, and how a batch is written by the order rule (materialize/order.py).
-- Each statement stands below a line "-- name: NAME". Times are microseconds since 1970, UTC.

-- name: schema
-- records is a rowid table on purpose: with WITHOUT ROWID every random key rewrites a page full of payloads, and a file of
-- 200,000 rows of 436 bytes takes 39,000 rows/s instead of 125,000.
CREATE TABLE IF NOT EXISTS records (
    view        TEXT    NOT NULL,
    entity_key  BLOB    NOT NULL,
    event_us    INTEGER,           -- NULL: a tombstone
    created_us  INTEGER NOT NULL,
    version     INTEGER NOT NULL,
    floor       INTEGER NOT NULL,
    due_us      INTEGER,           -- may be purged from then on; NULL: never
    lead        BLOB    NOT NULL,  -- the first 4 bytes of the record: format version, flags, schema id
    payload     BLOB    NOT NULL,  -- the record behind its header (docs/format.md)
    PRIMARY KEY (view, entity_key)
);
-- For purge, which every run calls: its cost grows with what is due, not with the table. Rows that stay for ever are not in it.
CREATE INDEX IF NOT EXISTS due ON records (view, due_us) WHERE due_us IS NOT NULL;
CREATE TABLE IF NOT EXISTS cells (
    view     TEXT NOT NULL,
    name     TEXT NOT NULL,
    content  BLOB NOT NULL,
    PRIMARY KEY (view, name)
) WITHOUT ROWID;

-- name: incoming
CREATE TEMP TABLE IF NOT EXISTS incoming (
    row         INTEGER PRIMARY KEY,
    entity_key  BLOB, event_us INTEGER, created_us INTEGER, version INTEGER, floor INTEGER, lead BLOB, payload BLOB,
    outcome     INTEGER, due_us INTEGER
);

-- name: fill
INSERT INTO incoming (row, entity_key, event_us, created_us, version, floor, lead, payload) VALUES (?, ?, ?, ?, ?, ?, ?, ?);

-- name: merge
-- An added row. What is to be stored for each entity: the outcome, and the order fields that it gets (outcomes: 0 stale,
-- 1 written, 2 unchanged). IS compares NULLs as equal: two tombstones are of the same order.
UPDATE incoming SET (outcome, floor) = (
    SELECT CASE
        WHEN incoming.version > held.floor AND (
            (incoming.event_us IS NOT NULL AND (held.event_us IS NULL
                OR (incoming.event_us, incoming.created_us) > (held.event_us, held.created_us)))
            OR (:tie_wins AND incoming.event_us IS held.event_us AND incoming.created_us = held.created_us
                AND incoming.version > held.version))
        THEN 1
        WHEN incoming.event_us IS held.event_us AND incoming.created_us = held.created_us THEN 2
        ELSE 0 END, held.floor
    FROM records held WHERE held.view = :view AND held.entity_key = incoming.entity_key)
WHERE EXISTS (SELECT 1 FROM records held WHERE held.view = :view AND held.entity_key = incoming.entity_key);

-- name: replace
-- The entity's full state in the snapshot :at. Outcome 3 is 1 with the version that is held, which is greater than :at;
-- outcome 4 is 0 with the floor of the held record raised to :at.
UPDATE incoming SET (outcome, version) = (
    SELECT CASE
        WHEN :at = held.floor THEN 2
        WHEN :at < held.floor THEN 0
        WHEN held.version <= :at THEN 1
        WHEN incoming.event_us IS NOT NULL AND (held.event_us IS NULL
            OR (incoming.event_us, incoming.created_us) > (held.event_us, held.created_us)) THEN 3
        ELSE 4 END, max(held.version, :at)
    FROM records held WHERE held.view = :view AND held.entity_key = incoming.entity_key)
WHERE EXISTS (SELECT 1 FROM records held WHERE held.view = :view AND held.entity_key = incoming.entity_key);

-- name: raise
-- Keep the held record of an outcome 4, with a new floor and so a later end.
UPDATE records SET floor = :at, due_us = CASE
        WHEN event_us IS NULL THEN :keep_until_us
        WHEN :ttl_us IS NULL THEN NULL
        ELSE max(event_us + :ttl_us, :keep_until_us) END
WHERE view = :view AND entity_key IN (SELECT entity_key FROM incoming WHERE outcome = 4);

-- name: store
INSERT INTO records (view, entity_key, event_us, created_us, version, floor, due_us, lead, payload)
SELECT :view, entity_key, event_us, created_us, version, floor, CASE
        WHEN event_us IS NULL THEN :keep_until_us
        WHEN :ttl_us IS NULL THEN NULL
        WHEN floor > 0 THEN max(event_us + :ttl_us, :keep_until_us)
        ELSE event_us + :ttl_us END, lead, payload
FROM incoming WHERE coalesce(outcome, 1) IN (1, 3) ORDER BY entity_key
ON CONFLICT (view, entity_key) DO UPDATE SET
    event_us = excluded.event_us, created_us = excluded.created_us, version = excluded.version, floor = excluded.floor,
    due_us = excluded.due_us, lead = excluded.lead, payload = excluded.payload;

-- name: outcomes
SELECT CASE coalesce(outcome, 1) WHEN 3 THEN 1 WHEN 4 THEN 0 ELSE coalesce(outcome, 1) END FROM incoming ORDER BY row;

-- name: empty
DELETE FROM incoming;

-- name: read
SELECT event_us, created_us, version, floor, lead, payload FROM records WHERE view = ? AND entity_key = ?;

-- name: scan
SELECT entity_key, event_us, created_us, version, floor, lead, payload FROM records
WHERE view = ? AND entity_key > ? ORDER BY entity_key LIMIT ?;

-- name: key_at
SELECT entity_key FROM records WHERE view = :view ORDER BY entity_key
LIMIT 1 OFFSET (SELECT CAST(:start * count(*) AS INTEGER) FROM records WHERE view = :view);

-- name: read_cell
SELECT content FROM cells WHERE view = ? AND name = ?;

-- name: write_cell
INSERT INTO cells (view, name, content) VALUES (?, ?, ?) ON CONFLICT (view, name) DO UPDATE SET content = excluded.content;

-- name: purge
DELETE FROM records WHERE view = ? AND due_us <= ?;
