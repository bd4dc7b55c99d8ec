-- Write a cell if it holds what is expected, atomically.
--
-- KEYS[1]  the cell      ARGV[1]  the new content      ARGV[2]  the expected content; absent: the cell must not exist
-- Returns 1 when written, 0 when the cell holds something else.

if redis.call("GET", KEYS[1]) ~= (ARGV[2] or false) then return 0 end
redis.call("SET", KEYS[1], ARGV[1])
return 1
