-- What each script of this folder begins with: see scripts.py.

local LEASE_MAX_MS = 60000 -- a lease further ahead is of a clock that was set back since

-- For numbers that are joined to text: Lua writes one of 15 digits and more as 1e+15. Those that are
-- a command's argument by themselves are written in full.
local function int(number) return string.format('%.0f', number) end

local function now_ms()
  local time = redis.call('TIME')
  return tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
end

-- The store's life, '' where it does not say, and how many replicas it has. A server that starts, is
-- promoted, or takes over a slot has another life.
local function store_life()
  local info = redis.pcall('INFO', 'replication')
  if type(info) ~= 'string' then return '', 0 end
  -- Not as one pattern, which would be tried at each place of a long text for each append.
  local _, at = string.find(info, 'master_replid:', 1, true)
  return at and string.match(info, '^%w+', at + 1) or '',
    tonumber(string.match(info, 'connected_slaves:(%d+)') or '0')
end

