-- What the scripts of both layouts begin with. Each then reads and stores in its own way what the order rule (rule.lua, put into them in
-- the place of "-- RULE") says of one row; as text, because a call for each row cost 5 % of the server's time.
--
-- ARGV[1]      "merge" (an added row), "merge_tie" (the same, an equal order with a greater version wins) or
--              "replace" (the full state in the snapshot that is the record's own version and floor)
-- ARGV[2]      the view's ttl in microseconds of event time, "" for none
-- ARGV[3]      tombstones, and records with a floor, stay at least until this time, milliseconds since 1970
--
-- Both return n characters, one per key: "0" stale, "1" written, "2" unchanged (materialize/order.py), "3" the key holds
-- something that is no record of this format and was left alone. A record is 36 bytes of header, then the payload (docs/format.md).
--
-- A record is looked for in a string and in the field "_" of a hash, whichever the key is: so a view can change its layout while a
-- run that does not know it yet still writes. A key is brought into the layout of the script that stores a row of its own there; a
-- record that stays, with a greater floor, stays where it is.
--
-- In a cluster the keys of one server lie in many slots, mostly one in each. Declared, they would be refused (CROSSSLOT); as
-- arguments they are allowed by the flag allow-cross-slot-keys, which is put before this script there, as long as every command has
-- keys of one slot: so no MGET or MSET then. (On Valkey 9.1.2 a script that tries that breaks every script of the server until it
-- restarts.) When the server does not own one of the keys any more the script ends there, with the rows before it stored.
--
-- Numbers are unpacked, never compared as strings: Lua's string order follows the server's locale. All are exact below
-- 2^53. A record that is stored as it came costs half of one that is put together anew, so bytes are only replaced where
-- they differ.

local SIZE, FORMAT, TOMBSTONE = 36, 1, 1
local FIELDS = "<BBxxi8i8i8i8" -- format version, flags, event time, created time, version, floor
local replacing, tie_wins = ARGV[1] == "replace", ARGV[1] == "merge_tie"
local ttl, keep = tonumber(ARGV[2]), tonumber(ARGV[3])
local unpack_fields, sub = struct.unpack, string.sub

-- A record that stays, with another floor and expiry: in a hash, or in a string, of which `kept` may be the header alone.
local function refloor(key, kept, time, hashed)
  if hashed then redis.call("HSET", key, "_", kept) else redis.call("SETRANGE", key, "28", sub(kept, 29, 36)) end
  if time then redis.call("PEXPIREAT", key, time) else redis.call("PERSIST", key) end
end
