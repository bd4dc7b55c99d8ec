-- Store records of one view by the order rule (materialize/order.py), atomically for all keys of the call.
--
-- KEYS[1..n]   record keys; none in a call for keys of several slots of one server of a cluster (see below)
-- ARGV[1]      "merge" (an added row), "merge_tie" (the same, an equal order with a greater version wins) or
--              "replace" (the full state in the snapshot that is the record's own version and floor)
-- ARGV[2]      the view's ttl in microseconds of event time, "" for none
-- ARGV[3]      tombstones, and records with a floor, stay at least until this time, milliseconds since 1970
-- ARGV[4..]    n records (docs/format.md): 36 bytes of header, then the payload; where KEYS is empty, n record keys before them
--
-- Returns n characters, one per key: "0" stale, "1" written, "2" unchanged (materialize/order.py), "3" the key holds
-- something that is no record of this format and was left alone.
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
local declared, keys, first, held = #KEYS > 0, KEYS, 3, {}
if declared then
  held = redis.call("MGET", unpack(KEYS))
else
  keys, first = {}, 3 + (#ARGV - 3) / 2
  for i = 1, first - 3 do
    keys[i] = ARGV[i + 3]
    held[i] = redis.call("GET", keys[i])
  end
end
-- Records without an expiry are stored at the end: over keys that hold a record, and to keys that MGET gave nothing for,
-- which are absent or hold a hash, list ... that must be left alone.
local outcomes, over, last_over, fresh, last_fresh, fresh_row = {}, {}, 0, {}, 0, {}

for i = 1, #keys do
  local new, old = ARGV[first + i], held[i]
  local _, flags, event, created, version, floor = unpack_fields(FIELDS, new)
  local dead = flags % 2 == TOMBSTONE
  local outcome, kept = "1", new -- kept: what the key holds afterwards, nil when nothing changes

  if old then
    local format, old_flags, old_event, old_created, old_version, old_floor
    if #old >= SIZE then
      format, old_flags, old_event, old_created, old_version, old_floor = unpack_fields(FIELDS, old)
    end
    if format ~= FORMAT then
      outcome, kept = "3", nil
    else
      local old_dead = old_flags % 2 == TOMBSTONE
      local same = dead == old_dead and event == old_event and created == old_created
      local newer = not dead and (old_dead or event > old_event or (event == old_event and created > old_created))
      if not replacing then
        if version > old_floor and (newer or (tie_wins and same and version > old_version)) then
          if old_floor ~= floor then
            kept, floor = sub(new, 1, 28) .. sub(old, 29, 36) .. sub(new, 37), old_floor
          end
        else
          outcome, kept = same and "2" or "0", nil
        end
      elseif version <= old_floor then
        outcome, kept = version == old_floor and "2" or "0", nil
      elseif old_version > version then
        if newer then
          kept = sub(new, 1, 20) .. sub(old, 21, 28) .. sub(new, 29)
        else
          outcome, kept = "0", sub(old, 1, 28) .. sub(new, 29, 36) .. sub(old, 37)
          dead, event = old_dead, old_event
        end
      end
    end
  end

  if kept then
    local due = dead and keep
    if ttl and not dead then
      due = math.max(1, math.ceil((event + ttl) / 1000)) -- SET refuses times before 1970
      if floor > 0 and due < keep then due = keep end
    end
    if due then
      local time = string.format("%.0f", due)
      if old then
        redis.call("SET", keys[i], kept, "PXAT", time)
      elseif not redis.call("SET", keys[i], kept, "PXAT", time, "NX") then
        outcome = "3"
      end
    elseif not declared then
      if old then
        redis.call("SET", keys[i], kept)
      elseif not redis.call("SET", keys[i], kept, "NX") then
        outcome = "3"
      end
    elseif old then
      over[last_over + 1], over[last_over + 2] = keys[i], kept
      last_over = last_over + 2
    else
      fresh[last_fresh + 1], fresh[last_fresh + 2] = keys[i], kept
      last_fresh = last_fresh + 2
      fresh_row[last_fresh] = i
    end
  end
  outcomes[i] = outcome
end

if last_over > 0 then redis.call("MSET", unpack(over)) end
if last_fresh > 0 and redis.call("MSETNX", unpack(fresh)) == 0 then
  for n = 2, last_fresh, 2 do
    if not redis.call("SET", fresh[n - 1], fresh[n], "NX") then outcomes[fresh_row[n]] = "3" end
  end
end
return table.concat(outcomes)
