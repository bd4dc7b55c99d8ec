-- Weigh records: store each, ask for its memory, and remove it, in one call, so that a client that dies leaves nothing.
--
-- KEYS[1..n]   keys that nobody else uses
-- ARGV[1]      milliseconds until a key would expire, "" for never: a key with an expiry takes more memory
-- ARGV[2..]    n records
--
-- Returns n + 1 numbers: what used_memory grew by with all of them, then what MEMORY USAGE says of each. All keys are gone then, also
-- where it returns an error. A SET with an expiry in the past deletes, and needs no right that runs do not have.

local function used()
  local told = redis.pcall("INFO", "memory")
  return type(told) == "string" and tonumber(string.match(told, "used_memory:(%d+)")) or 0
end

local told, failed = {}, nil
local before = used()
for i = 1, #KEYS do
  local reply
  if ARGV[1] == "" then
    reply = redis.pcall("SET", KEYS[i], ARGV[i + 1])
  else
    reply = redis.pcall("SET", KEYS[i], ARGV[i + 1], "PX", ARGV[1])
  end
  failed = failed or (reply.err and reply)
end
told[1] = used() - before
for i = 1, #KEYS do
  local reply = redis.pcall("MEMORY", "USAGE", KEYS[i])
  if type(reply) == "table" then failed = failed or reply end
  told[i + 1] = reply
end
for i = 1, #KEYS do redis.pcall("SET", KEYS[i], "", "PXAT", 1) end
return failed or told
