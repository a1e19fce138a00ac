-- Devices' logins at the broker, of all tenants.
--
-- KEYS[1] owners  hash: "tenant:device" -> JSON list of [user, session, until, issued, key], oldest
--                 first; both times in ms, as text, and the key's id: of the token that it is for
-- KEYS[2] ends    sorted set: "user tenant:device" by until ms
-- KEYS[3] gone    set: users that are no longer kept, and that the broker may have
-- ARGV    verb, then its arguments -> list of users

local verb = ARGV[1]
local MOST_GONE = 4096 -- beyond it they are found by comparing all that the broker has

local function load(owner)
  local known = redis.call('HGET', KEYS[1], owner)
  return known and cjson.decode(known) or {}
end

local function save(owner, list)
  if #list == 0 then redis.call('HDEL', KEYS[1], owner)
  else redis.call('HSET', KEYS[1], owner, cjson.encode(list)) end
end

-- The first of those that `meant` says yes to, or all of them, go; returns their users.
local function drop(owner, meant, most)
  local kept, gone = {}, {}
  for _, one in ipairs(load(owner)) do
    if #gone < most and meant(one) then
      redis.call('ZREM', KEYS[2], one[1] .. ' ' .. owner)
      gone[#gone + 1] = one[1]
      if redis.call('SCARD', KEYS[3]) < MOST_GONE then redis.call('SADD', KEYS[3], one[1]) end
    else kept[#kept + 1] = one end
  end
  if #gone > 0 then save(owner, kept) end
  return gone
end

-- grant: owner, session, user that it says it has or '', a fresh one or '' for none, until, issued,
-- key; how many there may be of all, of one device, and of it for one session -> its user, or ''
-- where there is no room; then those that went: the device's oldest for that session
if verb == 'grant' then
  local owner, session, asked, fresh, ends = ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6]
  local list, same = load(owner), 0
  for _, one in ipairs(list) do
    if one[2] == session and (one[1] == asked or one[1] == fresh) then
      if tonumber(ends) > tonumber(one[3]) then
        one[3], one[4], one[5] = ends, ARGV[7], ARGV[8]
        save(owner, list)
        redis.call('ZADD', KEYS[2], ends, one[1] .. ' ' .. owner)
      end
      return {one[1]}
    end
    if one[2] == session then same = same + 1 end
  end
  if fresh == '' then return {''} end
  local gone = drop(owner, function(one) return one[2] == session end, same + 1 - tonumber(ARGV[11]))
  list = load(owner)
  if redis.call('ZCARD', KEYS[2]) >= tonumber(ARGV[9]) or #list >= tonumber(ARGV[10]) then
    return {'', unpack(gone)}
  end
  list[#list + 1] = {fresh, session, ends, ARGV[7], ARGV[8]}
  save(owner, list)
  redis.call('ZADD', KEYS[2], ends, fresh .. ' ' .. owner)
  return {fresh, unpack(gone)}
end

-- drop: owner, user -> it, where it was there
if verb == 'drop' then
  return drop(ARGV[2], function(one) return one[1] == ARGV[3] end, math.huge)
end

-- void: owner, a session's name, or the beginning of names and '*'; before when the token was issued
-- -> whose logins went
if verb == 'void' then
  local sessions, before = ARGV[3], tonumber(ARGV[4])
  local begins = string.sub(sessions, -1) == '*' and string.sub(sessions, 1, -2)
  return drop(ARGV[2], function(one)
    if tonumber(one[4]) >= before then return false end
    if begins then return string.sub(one[2], 1, #begins) == begins end
    return one[2] == sessions
  end, math.huge)
end

-- cleared: users that the broker does not have any more
if verb == 'cleared' then
  redis.call('SREM', KEYS[3], unpack(ARGV, 2))
  return {}
end

-- ended: now ms, how many at most -> of those that the broker has to lose: whose time is over, and
-- what was dropped before by somebody who did not tell it
for _, member in ipairs(redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', ARGV[2], 'LIMIT', 0, ARGV[3])) do
  local user, owner = string.match(member, '^(%S+) (.*)$')
  drop(owner, function(one) return one[1] == user end, math.huge)
  redis.call('ZREM', KEYS[2], member)
end
return redis.call('SRANDMEMBER', KEYS[3], ARGV[3])
