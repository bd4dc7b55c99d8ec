-- Store records of one view as strings, atomically for all keys of the call. Put behind head.lua.
--
-- KEYS[1..n]   record keys; none in a call for keys of several slots of one server of a cluster (head.lua)
-- ARGV[4..]    n records; where KEYS is empty, n record keys before them

-- Of what a key holds the rule needs the header. MGET gives whole records in one call, each of which Lua hashes byte by byte: from this
-- length on, that costs more than a GETRANGE for each key.
local LONG = 800

local declared, keys, first, held = #KEYS > 0, KEYS, 3, {}
if not declared then
  keys, first = {}, 3 + (#ARGV - 3) / 2
  for i = 1, first - 3 do keys[i] = ARGV[i + 3] end
end
if declared and #ARGV[4] < LONG then
  held = redis.call("MGET", unpack(KEYS))
else
  for i = 1, #keys do
    local old = redis.pcall("GETRANGE", keys[i], "0", "35")
    if type(old) == "table" then
      if not string.find(old.err, "WRONGTYPE", 1, true) then return old end
      old = "" -- as MGET says it
    end
    held[i] = old ~= "" and old
  end
end

-- *new* for a key that holds something that MGET does not give: a hash of ours becomes a string, anything else is left alone.
local function store_over(key, new)
  local old = redis.pcall("HGET", key, "_")
  if type(old) ~= "string" then return "3" end
  -- RULE
  if stays then
    refloor(key, kept, time, true)
  elseif kept and time then
    redis.call("SET", key, kept, "PXAT", time)
  elseif kept then
    redis.call("SET", key, kept)
  end
  return outcome
end

-- Records without an expiry are stored at the end: over keys that hold a record, and to keys that MGET gave nothing for,
-- which are absent or hold a hash, list ...
local outcomes, over, last_over, fresh, last_fresh, fresh_row = {}, {}, 0, {}, 0, {}

for i = 1, #keys do
  local new, old = ARGV[first + i], held[i]
  -- RULE
  if stays then
    refloor(keys[i], kept, time, false)
  elseif kept then
    if time then
      if old then
        redis.call("SET", keys[i], kept, "PXAT", time)
      elseif not redis.call("SET", keys[i], kept, "PXAT", time, "NX") then
        outcome = store_over(keys[i], new)
      end
    elseif not declared then
      if old then
        redis.call("SET", keys[i], kept)
      elseif not redis.call("SET", keys[i], kept, "NX") then
        outcome = store_over(keys[i], new)
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
    if not redis.call("SET", fresh[n - 1], fresh[n], "NX") then
      outcomes[fresh_row[n]] = store_over(fresh[n - 1], fresh[n])
    end
  end
end
return table.concat(outcomes)
