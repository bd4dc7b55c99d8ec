-- Store the record in the argument *place*, which its holes and texts follow (write_hash.lua), as fields of *key*. The names of the
-- *features* begin behind the argument *names*. *kept*: what becomes the field "_", the record or what it is after the order rule.
local AT_ONCE = 1000 -- features of one HSET: what unpack gives at once is limited

local function set_fields(key, kept, features, names, place)
  local words, last, holes = {key, "_", kept}, 3, ARGV[place + 1]
  for feature = 1, features do
    if holes == "" or string.byte(holes, feature) == 48 then
      words[last + 1], words[last + 2] = ARGV[names + feature], ARGV[place + 1 + feature]
      last = last + 2
      if last > 2 * AT_ONCE then
        redis.call("HSET", unpack(words))
        words, last = {key}, 1
      end
    end
  end
  if last > 1 then redis.call("HSET", unpack(words)) end
end

