"""The tables of the ledger's SQLite file, and the names of what is beside it."""

SCHEMA_VERSION = 3
APPLICATION_ID = 0x51_1C_E0_01
FILE = "ledger.sqlite"
SEGMENTS = "groups"
LOCK = "ledger.lock"

TABLES = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS files (
    id INTEGER PRIMARY KEY, split TEXT NOT NULL, source TEXT NOT NULL, path TEXT NOT NULL, sha256 TEXT NOT NULL,
    weight REAL NOT NULL, num_prompts INTEGER NOT NULL
);
CREATE TABLE IF NOT EXISTS prompts (
    id INTEGER PRIMARY KEY, file INTEGER NOT NULL, row INTEGER NOT NULL, data BLOB NOT NULL, rejected TEXT NOT NULL,
    hash BLOB NOT NULL
);
CREATE INDEX IF NOT EXISTS prompts_by_hash ON prompts (hash);
CREATE TABLE IF NOT EXISTS visits (
    number INTEGER PRIMARY KEY, prompt INTEGER NOT NULL, state TEXT NOT NULL, reason TEXT NOT NULL,
    attempt INTEGER NOT NULL, holder TEXT NOT NULL, granted TEXT NOT NULL, granted_at REAL NOT NULL,
    pinned INTEGER NOT NULL, returned INTEGER NOT NULL, versions TEXT NOT NULL, step TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS filtered_visits ON visits (reason) WHERE state = 'filtered';
CREATE INDEX IF NOT EXISTS prompts_by_file ON prompts (file);
CREATE TABLE IF NOT EXISTS payloads (
    visit INTEGER PRIMARY KEY, segment INTEGER NOT NULL, offset INTEGER NOT NULL, size_bytes INTEGER NOT NULL,
    checksum INTEGER NOT NULL
);
CREATE VIEW IF NOT EXISTS visits_with_ends AS SELECT number, state,
    state IN ('filtered', 'rejected', 'quarantined', 'unused')
    OR state = 'trained' AND number NOT IN (SELECT visit FROM payloads) AS has_ended FROM visits;
CREATE TABLE IF NOT EXISTS evaluation_visits (
    number INTEGER PRIMARY KEY, prompt INTEGER NOT NULL, source TEXT NOT NULL, version TEXT NOT NULL,
    asked_at REAL NOT NULL, attempt INTEGER NOT NULL, holder TEXT NOT NULL, granted TEXT NOT NULL,
    granted_at REAL NOT NULL, result BLOB
);
CREATE TABLE IF NOT EXISTS evaluations (id INTEGER PRIMARY KEY, data BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS members (name TEXT PRIMARY KEY, role TEXT NOT NULL, endpoint TEXT NOT NULL) WITHOUT ROWID;
"""
