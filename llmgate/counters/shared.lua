-- One operation on one key's counters (shared.py). Times are milliseconds.
--
-- KEYS: the epoch marker, the key's counts, its places by their ends.
-- ARGV: op, the server's run id, hour at which budgets turn, strict ("1"), the time or 0 for the server's own; then
--   look
--   settle   the place (id, minute, tokens reserved, epoch); tokens spent, requests
--   renew    seed (day, month, tokens of each); places (as above)
--   reserve  id, tokens; seed (as above); five limits, -1 for none
-- Before it stand KEEP_MS, RECALL_MS, COMMIT_MS and HOLD_MS, from shared.py and its package.

local epoch_key, row_key, held_key = KEYS[1], KEYS[2], KEYS[3]
local op, run, hour, strict, now = ARGV[1], ARGV[2], tonumber(ARGV[3]), ARGV[4] == '1', tonumber(ARGV[5])
local MINUTE, DAY = 60000, 86400000
local floor, max = math.floor, math.max
if now == 0 then
  local time = redis.call('TIME')
  now = time[1] * 1000 + floor(time[2] / 1000)
end
local said = redis.call('HMGET', epoch_key, 'run', 'at')
local epoch = tonumber(said[2])
if said[1] ~= run or not epoch then
  epoch = now
  redis.call('HSET', epoch_key, 'run', run, 'at', now)
end

-- The civil calendar from days since 1970: Howard Hinnant, "chrono-compatible low-level date algorithms".
local function month_of(day)
  local z = day + 719468
  local era = floor(z / 146097)
  local doe = z - era * 146097
  local yoe = floor((doe - floor(doe / 1460) + floor(doe / 36524) - floor(doe / 146096)) / 365)
  local doy = doe - (365 * yoe + floor(yoe / 4) - floor(yoe / 100))
  local mp = floor((5 * doy + 2) / 153)
  local month = mp < 10 and mp + 3 or mp - 9
  return (yoe + era * 400 + (month <= 2 and 1 or 0)) * 12 + month - 1
end
local minute = floor(now / MINUTE)
local day = floor((now - hour * 3600000) / DAY)
local month = month_of(day)

local names = {'minute', 'requests', 'requests_before', 'tokens', 'tokens_before', 'day', 'day_tokens', 'month',
               'month_tokens', 'epoch'}
local stored = redis.call('HMGET', row_key, unpack(names))
local c = {}
for i, name in ipairs(names) do c[name] = tonumber(stored[i]) or 0 end
local known = stored[10] and c.epoch == epoch
local passed = minute - c.minute
if passed == 1 then
  c.minute, c.requests, c.requests_before, c.tokens, c.tokens_before = minute, 0, c.requests, 0, c.tokens
elseif passed ~= 0 and passed ~= -1 then
  c.minute, c.requests, c.requests_before, c.tokens, c.tokens_before = minute, 0, 0, 0, 0
end
if day > c.day then c.day, c.day_tokens = day, 0 end
if month > c.month then c.month, c.month_tokens = month, 0 end

local function keep()
  local row = {}
  for _, name in ipairs(names) do row[#row + 1] = name; row[#row + 1] = string.format('%.0f', c[name]) end
  redis.call('HSET', row_key, unpack(row))
  redis.call('PEXPIRE', row_key, KEEP_MS)
  redis.call('PEXPIRE', held_key, KEEP_MS)
end
local function answer(status)
  return {status, now, epoch, c.minute, c.requests, c.requests_before, c.tokens, c.tokens_before, c.day, c.day_tokens,
          c.month, c.month_tokens, redis.call('ZCOUNT', held_key, '(' .. now, '+inf')}
end
-- Takes what the ledger says, in ARGV from `at`: day, month, tokens of each. Whether the key's budgets are known now.
local function seed(at)
  if known then return true end
  if tonumber(ARGV[at]) ~= day or tonumber(ARGV[at + 1]) ~= month or (strict and now < epoch + COMMIT_MS) then
    return false
  end
  c.day_tokens, c.month_tokens = max(c.day_tokens, tonumber(ARGV[at + 2])), max(c.month_tokens, tonumber(ARGV[at + 3]))
  c.epoch, known = epoch, true
  return true
end
-- Adds in the windows that a request was counted in.
local function add(at_minute, tokens, requests)
  if at_minute == c.minute then
    c.requests, c.tokens = max(0, c.requests + requests), max(0, c.tokens + tokens)
  elseif at_minute == c.minute - 1 then
    c.requests_before, c.tokens_before = max(0, c.requests_before + requests), max(0, c.tokens_before + tokens)
  end
  local at_day = floor((at_minute * MINUTE - hour * 3600000) / DAY)
  if at_day == c.day then c.day_tokens = max(0, c.day_tokens + tokens) end
  if month_of(at_day) == c.month then c.month_tokens = max(0, c.month_tokens + tokens) end
end
local function member(id, at_minute, tokens)
  return id .. ':' .. string.format('%.0f:%.0f', at_minute, tokens)
end

if op == 'look' then return answer('ok') end

if op == 'settle' then
  local id, at_minute, reserved = ARGV[6], tonumber(ARGV[7]), tonumber(ARGV[8])
  if redis.call('ZREM', held_key, member(id, at_minute, reserved)) == 0 then
    return answer(tonumber(ARGV[9]) ~= epoch and 'lost' or 'ok')
  end
  add(at_minute, tonumber(ARGV[10]) - reserved, tonumber(ARGV[11]) - 1)
  keep()
  return answer('ok')
end

if op == 'renew' then
  local status = 'ok'
  for at = 10, #ARGV, 4 do
    local id, at_minute, tokens = ARGV[at], tonumber(ARGV[at + 1]), tonumber(ARGV[at + 2])
    local place = member(id, at_minute, tokens)
    if not redis.call('ZSCORE', held_key, place) and tonumber(ARGV[at + 3]) ~= epoch then
      if not seed(6) then
        status = 'unseeded'
        break
      end
      add(at_minute, tokens, 1)
    end
    redis.call('ZADD', held_key, now + HOLD_MS, place)
  end
  if known then keep() end
  return answer(status)
end

-- reserve
if strict and now < epoch + RECALL_MS then return answer('recalling') end
if not seed(8) then return answer('unseeded') end
redis.call('ZREMRANGEBYSCORE', held_key, '-inf', now)
local id, tokens = ARGV[6], tonumber(ARGV[7])
for _, at_minute in ipairs({c.minute, c.minute - 1}) do
  if redis.call('ZSCORE', held_key, member(id, at_minute, tokens)) then
    c.again = at_minute
  end
end
if c.again then
  local same = answer('ok')
  same[14] = c.again
  return same
end
local left = MINUTE - math.min(MINUTE, max(0, now - c.minute * MINUTE))
local function fits(most, current, before, asked)
  if most < 0 then return true end
  if strict and c.minute * MINUTE < epoch then current = max(current, most) end
  if strict and (c.minute - 1) * MINUTE < epoch then before = max(before, most) end
  return asked <= most and (current + asked - most) * MINUTE + before * left <= 0
end
local most = {}
for i = 1, 5 do most[i] = tonumber(ARGV[11 + i]) end
local room = fits(most[1], c.requests, c.requests_before, 1)
  and fits(most[2], c.tokens, c.tokens_before, tokens)
  and (most[3] < 0 or redis.call('ZCARD', held_key) < most[3])
  and (most[4] < 0 or c.day_tokens + tokens <= most[4])
  and (most[5] < 0 or c.month_tokens + tokens <= most[5])
if room then
  add(c.minute, tokens, 1)
  redis.call('ZADD', held_key, now + HOLD_MS, member(id, c.minute, tokens))
end
keep()
return answer(room and 'ok' or 'refused')
