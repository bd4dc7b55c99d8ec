-- Weigh records: store each, ask for its memory, and remove it, in one call, so that a client that dies leaves nothing. Put behind
-- set_fields.lua.
--
-- KEYS[1..n]   keys that nobody else uses
-- ARGV[1]      milliseconds until a key would expire, "" for never: a key with an expiry takes more memory
-- ARGV[2]      how many features hashes have, f; "" for strings
-- ARGV[3..]    the f names of the features; then for each row its record, in the layout `hash` with holes and f texts (write_hash.lua)
--
-- Returns n + 1 numbers: of strings what used_memory grew by with all of them, of hashes how many of their fields the server keeps in
-- hash tables and not packed; then what MEMORY USAGE says of each. All keys are gone then, also where it returns an error. A SET with an
-- expiry in the past deletes, and needs no right that runs do not have.

local features = tonumber(ARGV[2])
local first = 3 + (features or 0)

local function used()
  local told = redis.pcall("INFO", "memory")
  return type(told) == "string" and tonumber(string.match(told, "used_memory:(%d+)")) or 0
end

local function remove(key) return redis.pcall("SET", key, "", "PXAT", 1) end

-- The place of the record of row i among the arguments.
local function place_of(i) return first + (i - 1) * (features and features + 2 or 1) end

local function store(i)
  if features then
    set_fields(KEYS[i], ARGV[place_of(i)], features, 2, place_of(i))
    if ARGV[1] ~= "" then
      redis.call("PEXPIREAT", KEYS[i], string.format("%.0f", redis.call("TIME")[1] * 1000 + ARGV[1]))
    end
  elseif ARGV[1] == "" then
    redis.call("SET", KEYS[i], ARGV[place_of(i)])
  else
    redis.call("SET", KEYS[i], ARGV[place_of(i)], "PX", ARGV[1])
  end
end

local function unpacked_fields(i)
  if redis.call("OBJECT", "ENCODING", KEYS[i]) ~= "hashtable" then return 0 end
  local _, holes = string.gsub(ARGV[place_of(i) + 1], "1", "")
  return features + 1 - holes
end

local function weighed()
  local told, before, unpacked = {}, used(), 0
  for i = 1, #KEYS do store(i) end
  told[1] = used() - before
  for i = 1, #KEYS do
    told[i + 1] = redis.call("MEMORY", "USAGE", KEYS[i], "SAMPLES", 0)
    if features then unpacked = unpacked + unpacked_fields(i) end
  end
  if features then told[1] = unpacked end
  return told
end

-- Who may not remove must not store.
for i = 1, #KEYS do
  local reply = remove(KEYS[i])
  if reply.err then return reply end
end
local done, reply = pcall(weighed)
for i = 1, #KEYS do remove(KEYS[i]) end
if done or type(reply) == "table" then return reply end
return {err = reply}
