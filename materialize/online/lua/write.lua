-- Store records of one view by the order rule (materialize/order.py), atomically for all keys of the call.
--
-- KEYS[1..n]   record keys
-- ARGV[1]      "merge" (an added row), "merge_tie" (the same, an equal order with a greater version wins) or
--              "replace" (the full state in the snapshot that is the record's own version and floor)
-- ARGV[2]      the view's ttl in microseconds of event time, "" for none
-- ARGV[3]      tombstones, and records with a floor, stay at least until this time, milliseconds since 1970
-- ARGV[4..]    n records (docs/format.md): 36 bytes of header, then the payload
--
-- Returns n characters, one per key: "0" stale, "1" written, "2" unchanged (materialize/order.py), "3" the key holds
-- something that is no record of this format and was left alone.
--
-- Numbers are unpacked, never compared as strings: Lua's string order follows the server's locale. All are exact below 2^53.

local HEADER, SIZE, FORMAT, TOMBSTONE = "<BBHi8i8i8i8", 36, 1, 1
local mode, ttl, keep = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local unpack_header, sub, byte = struct.unpack, string.sub, string.byte
local held = redis.call("MGET", unpack(KEYS))
-- Records without an expiry, stored at the end: keys that hold a record, and keys that MGET gave nothing for.
local outcomes, forever, absent, absent_at = {}, {}, {}, {}

local function expiry(dead, event, floored)
  if dead then return keep end
  if not ttl then return nil end
  local due = math.max(1, math.ceil((event + ttl) / 1000)) -- SET refuses times before 1970
  if floored and due < keep then return keep end
  return due
end

local function store(key, value, dead, event, floored)
  local due = expiry(dead, event, floored)
  if due then
    redis.call("SET", key, value, "PXAT", string.format("%.0f", due))
  else
    forever[#forever + 1] = key
    forever[#forever + 1] = value
  end
end

-- For a key that MGET gave nothing for: it is absent, or holds a hash, list ... that must be left alone.
local function create(i, value, dead, event, floored)
  local due = expiry(dead, event, floored)
  if not due then
    absent[#absent + 1] = KEYS[i]
    absent[#absent + 1] = value
    absent_at[#absent_at + 1] = i
  elseif not redis.call("SET", KEYS[i], value, "PXAT", string.format("%.0f", due), "NX") then
    return "3"
  end
  return "1"
end

for i = 1, #KEYS do
  local key, new, old = KEYS[i], ARGV[i + 3], held[i]
  local _, flags, _, event, created, version, floor = unpack_header(HEADER, new)
  local dead = flags % 2 == TOMBSTONE
  local outcome = "1"
  if not old then
    outcome = create(i, new, dead, event, floor > 0)
  elseif #old < SIZE or byte(old, 1) ~= FORMAT then
    outcome = "3"
  else
    local _, old_flags, _, old_event, old_created, old_version, old_floor = unpack_header(HEADER, old)
    local old_dead = old_flags % 2 == TOMBSTONE
    local both_live = not dead and not old_dead
    local same = (dead and old_dead) or (both_live and event == old_event and created == old_created)
    local newer = not dead and (old_dead or event > old_event or (event == old_event and created > old_created))
    if mode == "replace" then
      if version <= old_floor then
        outcome = version == old_floor and "2" or "0"
      elseif old_version <= version then
        store(key, new, dead, event, true)
      elseif newer then
        store(key, sub(new, 1, 20) .. sub(old, 21, 28) .. sub(new, 29), dead, event, true)
      else
        outcome = "0"
        store(key, sub(old, 1, 28) .. sub(new, 29, 36) .. sub(old, 37), old_dead, old_event, true)
      end
    elseif version > old_floor and (newer or (mode == "merge_tie" and same and version > old_version)) then
      if old_floor > 0 then new = sub(new, 1, 28) .. sub(old, 29, 36) .. sub(new, 37) end
      store(key, new, dead, event, old_floor > 0)
    else
      outcome = same and "2" or "0"
    end
  end
  outcomes[i] = outcome
end
if #forever > 0 then redis.call("MSET", unpack(forever)) end
if #absent > 0 and redis.call("MSETNX", unpack(absent)) == 0 then
  for n, i in ipairs(absent_at) do
    if not redis.call("SET", KEYS[i], absent[2 * n], "NX") then outcomes[i] = "3" end
  end
end
return table.concat(outcomes)
