-- Store records of one view as hashes, atomically for each key. Put behind head.lua and set_fields.lua.
--
-- KEYS[1..n]   record keys; none in a call for keys of several slots of one server of a cluster (head.lua)
-- ARGV[4]      how many features the rows have, f; 0 for tombstones
-- ARGV[5..]    the f names of the features; where KEYS is empty, n record keys; then for each row its record, its holes and f texts.
--              Holes: "" for a row that has all features, else a character for each: "1" for one that it lacks, whose text is ""
--
-- The field "_" has the record, every other field the text of the feature that it is named after. A row that is stored leaves no field
-- of an older one.

local features = tonumber(ARGV[4])
local width = features + 2
local keys, first = KEYS, 4 + features
if #KEYS == 0 then
  keys = {}
  local rows = (#ARGV - first) / (width + 1)
  for i = 1, rows do keys[i] = ARGV[first + i] end
  first = first + rows
end

-- All are read first: where a key is not this server's any more nothing is stored yet.
local held, hashes, outcomes = {}, {}, {}
for i = 1, #keys do
  local key, hash = keys[i], true
  local old = redis.pcall("HGET", key, "_")
  if type(old) == "table" then
    if not string.find(old.err, "WRONGTYPE", 1, true) then return old end
    hash, old = false, redis.pcall("GET", key)
    if type(old) == "table" then old = "" end -- neither, so no record
  elseif not old and redis.call("EXISTS", key) == 1 then
    old = "" -- a hash without a record
  end
  held[i], hashes[i] = old, hash
end

for i = 1, #keys do
  local key, place = keys[i], first + (i - 1) * width + 1
  local new, old = ARGV[place], held[i]
  -- RULE
  if stays then
    refloor(key, kept, time, hashes[i])
  elseif kept then
    if old then redis.call("PEXPIREAT", key, 1) end -- as DEL does, which users of runs may not send
    set_fields(key, kept, features, 4, place)
    if time then redis.call("PEXPIREAT", key, time) end
  end
  outcomes[i] = outcome
end
return table.concat(outcomes)
