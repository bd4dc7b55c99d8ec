-- The order rule (materialize/order.py) for one row: what becomes of a key that holds the record `old` (nil or false: nothing) when the
-- record `new` comes. Gives the locals `outcome`; `kept`, what the key holds afterwards, nil when nothing changes; `stays`, whether
-- that is `old` with another floor; `time`, when it expires, as text, nil for never.

local _, flags, event, created, version, floor = unpack_fields(FIELDS, new)
local dead = flags % 2 == TOMBSTONE
local outcome, kept, stays, time = "1", new

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
        outcome, kept, stays = "0", sub(old, 1, 28) .. sub(new, 29, 36) .. sub(old, 37), true
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
  if due then time = string.format("%.0f", due) end
end
