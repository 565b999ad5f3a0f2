-- The queue's state machine inside Redis: one script, so that every step happens whole or not at all.
-- KEYS[1]: prefix of all keys. ARGV[1]: operation, then its arguments as JSON. Returns JSON, or a number.
-- The arithmetic is that of policy.FairShare and memory.MemoryQueue; tests/queue/test_queue.py holds them together.
--
-- job:ID hash · wait:RANK:TENANT sorted set (number -> ID) · fair:SCOPE sorted set of waiting flows, served:SCOPE hash of
-- the others, left hash (SCOPE -> counter of who left last); SCOPE is "rank" or a rank · work stream and group "workers":
-- what is claimed · answer:ID stream · worker:NAME, owner:NAME, with a time to live · since sorted set (submission -> ID
-- of what waits) · load, units, tenants, ended hashes

local P = KEYS[1]
local call = redis.call
local clock = call("TIME")
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
local WEIGHT = { high = 64, normal = 8, low = 1 }

local function key(...)
  return P .. table.concat({ ... }, ":")
end

-- ---- fairness

local function weight(scope, flow)
  return scope == "rank" and WEIGHT[flow] or 1
end

local function join(scope, flow)
  local fair = key("fair", scope)
  if call("ZSCORE", fair, flow) then return end
  local first = call("ZRANGE", fair, 0, 0, "WITHSCORES")
  local floor = tonumber(first[2] or call("HGET", key("left"), scope) or 0)
  local served = tonumber(call("HGET", key("served", scope), flow) or 0)
  call("HDEL", key("served", scope), flow)
  call("ZADD", fair, math.max(floor, served), flow)
end

local function leave(scope, flow)
  local score = call("ZSCORE", key("fair", scope), flow)
  call("ZREM", key("fair", scope), flow)
  call("HSET", key("served", scope), flow, score)
  call("HSET", key("left"), scope, score)
end

local function charge(scope, flow, units)
  units = units / weight(scope, flow)
  if call("ZSCORE", key("fair", scope), flow) then
    call("ZINCRBY", key("fair", scope), units, flow)
  else
    call("HINCRBYFLOAT", key("served", scope), flow, units)
  end
end

local function charge_job(job, units)
  charge("rank", job.rank, units)
  charge(job.rank, job.tenant, units)
end

-- ---- one job

local FIELDS = { "tenant", "rank", "cost", "deadline", "keep", "owner", "state", "delivery", "deaths", "worker",
  "entry", "number", "submitted" }

local function read(id)
  local values = call("HMGET", key("job", id), unpack(FIELDS))
  if not values[1] then return nil end
  local job = { id = id }
  for i, name in ipairs(FIELDS) do job[name] = values[i] end
  for _, name in ipairs({ "cost", "deadline", "keep", "delivery", "deaths", "number", "submitted" }) do
    job[name] = tonumber(job[name])
  end
  return job
end

local function count(job, sign)
  call("HINCRBY", key("load"), "waiting", sign)
  call("HINCRBY", key("units"), job.rank, sign * job.cost)
  local num = call("HINCRBY", key("tenants"), "num:" .. job.tenant, sign)
  call("HINCRBY", key("tenants"), "units:" .. job.rank .. ":" .. job.tenant, sign * job.cost)
  if num == 0 then
    call("HDEL", key("tenants"), "num:" .. job.tenant, "units:high:" .. job.tenant, "units:normal:" .. job.tenant,
      "units:low:" .. job.tenant)
  end
end

local function wait(job)
  call("ZADD", key("wait", job.rank, job.tenant), job.number, job.id)
  call("ZADD", key("since"), job.submitted or now, job.id)
  join("rank", job.rank)
  join(job.rank, job.tenant)
  count(job, 1)
  call("HSET", key("job", job.id), "state", "waiting", "worker", "", "entry", "")
  call("LPUSH", key("bell"), 1)
  call("LTRIM", key("bell"), 0, 255)
end

local function unwait(job)
  local line = key("wait", job.rank, job.tenant)
  call("ZREM", line, job.id)
  call("ZREM", key("since"), job.id)
  count(job, -1)
  if call("EXISTS", line) == 0 then
    leave(job.rank, job.tenant)
    if call("EXISTS", key("fair", job.rank)) == 0 then leave("rank", job.rank) end
  end
end

local function let_go(job)
  if job.entry ~= "" then
    call("XACK", key("work"), "workers", job.entry)
    call("XDEL", key("work"), job.entry)
    call("HINCRBY", key("load"), "claimed", -1)
    call("HINCRBY", key("load"), "running", -job.cost)
  end
end

local function append(id, entry, ...)
  -- The number of the entry is (delivery, seq): what is sent twice is refused by Redis itself.
  local done = redis.pcall("XADD", key("answer", id), entry, ...)
  return type(done) == "string"
end

-- To the gateway that waits, with what there is to say, so that it need not ask; to everybody without one.
local function tell(job, entry, chunks, tail)
  local news = cjson.encode({ job.id, entry, chunks or cjson.null, tail or cjson.null })
  if job.owner == "" or call("PUBLISH", key("news", job.owner), news) == 0 then
    call("PUBLISH", key("news"), job.id)
  end
end

local function finish(job, kind, tail, entry)
  if job.state == "waiting" then unwait(job) else let_go(job) end
  call("HSET", key("job", job.id), "state", "ended", "end", tail, "entry", "")
  call("HDEL", key("job", job.id), "body")
  -- Behind everything a worker can have said, also where the entries before it have expired (a clock that jumped).
  if entry == nil then append(job.id, string.format("%d-%.0f", job.delivery, 2 ^ 53 - 1), "end", tail) end
  call("PEXPIRE", key("job", job.id), job.keep)
  call("PEXPIRE", key("answer", job.id), job.keep)
  call("HINCRBY", key("ended"), kind, 1)
  if entry == nil then call("PUBLISH", key("news"), job.id) end
end

local function tail_of(kind, message, err)
  return cjson.encode({ kind, message, err or "", cjson.null, cjson.null })
end

local function held(given)
  local job = read(given.id)
  if job and job.state == "claimed" and job.delivery == given.delivery then return job end
  return nil
end

local function hand_over(job, worker, entry)
  call("HSET", key("job", job.id), "state", "claimed", "worker", worker, "entry", entry, "delivery", job.delivery + 1)
  return { job.id, job.delivery + 1, job.deadline - now, call("HGET", key("job", job.id), "body") }
end

-- ---- operations

local op = {}

function op.load(a)
  local known = {}
  for i, id in ipairs(a.ids) do known[i] = call("EXISTS", key("job", id)) end
  local num_tenants = 0
  for _, scope in ipairs({ "high", "normal", "low" }) do
    num_tenants = math.max(num_tenants, call("ZCARD", key("fair", scope)))
    if scope == a.rank and not call("ZSCORE", key("fair", scope), a.tenant) then
      num_tenants = math.max(num_tenants, call("ZCARD", key("fair", scope)) + 1)
    end
  end
  local names = call("HMGET", key("tenants"), "num:" .. a.tenant, "units:" .. a.rank .. ":" .. a.tenant)
  local units = call("HMGET", key("units"), "high", "normal", "low")
  local load = call("HMGET", key("load"), "waiting", "running")
  return cjson.encode({
    tonumber(load[1] or 0), { tonumber(units[1] or 0), tonumber(units[2] or 0), tonumber(units[3] or 0) },
    tonumber(names[1] or 0), tonumber(names[2] or 0), math.max(1, num_tenants), tonumber(load[2] or 0), known,
  })
end

function op.submit(a)
  local fresh, units, sum = {}, 0, call("HMGET", key("units"), "high", "normal", "low")
  for _, job in ipairs(a.jobs) do
    if call("EXISTS", key("job", job.id)) == 0 then
      fresh[#fresh + 1] = job
      units = units + job.cost
    end
  end
  if #fresh == 0 then return 1 end
  -- The gate was asked before, but another gateway may have come between.
  local waiting = tonumber(call("HGET", key("load"), "waiting") or 0)
  local units_waiting = tonumber(sum[1] or 0) + tonumber(sum[2] or 0) + tonumber(sum[3] or 0)
  if waiting + #fresh > a.max_requests or units_waiting + units > a.max_units then return 0 end
  for _, job in ipairs(fresh) do
    job.number = call("INCR", key("number"))
    job.deadline, job.submitted = now + job.deadline_ms, now
    call("HSET", key("job", job.id), "tenant", job.tenant, "rank", job.rank, "cost", job.cost, "deadline", job.deadline,
      "submitted", now, "keep", job.keep_ms, "owner", job.owner, "delivery", 0, "deaths", 0, "number", job.number, "body", job.body)
    wait(job)
  end
  return 1
end

local function reclaim(a, claims)
  local cursor = call("HGET", key("load"), "cursor") or "0-0"
  local found = call("XAUTOCLAIM", key("work"), "workers", a.worker, a.lease_ms, cursor, "COUNT", a.num)
  call("HSET", key("load"), "cursor", found[1])
  for _, entry in ipairs(found[2]) do
    local job = read(entry[2][2])
    if not job or job.entry ~= entry[1] then
      call("XACK", key("work"), "workers", entry[1])
      call("XDEL", key("work"), entry[1])
    else
      job.deaths = call("HINCRBY", key("job", job.id), "deaths", 1)
      if job.deaths >= a.max_deliveries then
        finish(job, "failed", tail_of("failed",
          job.deaths .. " workers ended while they worked on it; it is not tried again", "engine"))
      elseif job.deadline <= now then
        finish(job, "expired", a.expired)
      else
        call("HINCRBY", key("load"), "redelivered", 1)
        claims[#claims + 1] = hand_over(job, a.worker, entry[1])
      end
    end
  end
end

local function next_job(a)
  while true do
    local rank = call("ZRANGE", key("fair", "rank"), 0, 0)[1]
    if not rank then return nil end
    local tenant = call("ZRANGE", key("fair", rank), 0, 0)[1]
    local job = read(call("ZRANGE", key("wait", rank, tenant), 0, 0)[1])
    if job.deadline <= now then
      finish(job, "expired", a.expired)
    elseif job.owner ~= "" and call("EXISTS", key("owner", job.owner)) == 0 then
      finish(job, "abandoned", a.abandoned)
    else
      return job
    end
  end
end

function op.claim(a)
  redis.pcall("XGROUP", "CREATE", key("work"), "workers", "0", "MKSTREAM")
  local claims = {}
  reclaim(a, claims)
  while #claims < a.num do
    local job = next_job(a)
    if not job then break end
    unwait(job)
    charge_job(job, job.cost)
    local entry = call("XADD", key("work"), "*", "id", job.id)
    call("XREADGROUP", "GROUP", "workers", a.worker, "COUNT", 1, "STREAMS", key("work"), ">")
    call("HINCRBY", key("load"), "claimed", 1)
    call("HINCRBY", key("load"), "running", job.cost)
    claims[#claims + 1] = hand_over(job, a.worker, entry)
  end
  return cjson.encode(claims)
end

function op.beat(a)
  call("SET", key("worker", a.worker), a.card, "PX", a.heard_ms)
  call("SADD", key("names"), a.worker)
  local lost = {}
  for _, given in ipairs(a.claims) do
    local job = held(given)
    if job then
      -- JUSTID: the entry is not idle any more, and nothing counts as another delivery.
      call("XCLAIM", key("work"), "workers", a.worker, 0, job.entry, "JUSTID")
    else
      lost[#lost + 1] = given.id
    end
  end
  return cjson.encode(lost)
end

function op.publish(a)
  local job = held(a)
  if not job then return 0 end
  local entry = string.format("%d-%d", a.delivery, a.seq)
  append(a.id, entry, "chunks", a.chunks)
  -- A day more than it can be asked for: a clock that jumps must not take the beginning of an answer from its reader.
  if a.seq == 1 then call("PEXPIRE", key("answer", a.id), math.max(0, job.deadline - now) + job.keep + 86400000) end
  tell(job, entry, a.chunks)
  return 1
end

function op.finish(a)
  local job = held(a)
  if not job then return 0 end
  charge_job(job, a.spent - job.cost)
  local entry = string.format("%d-%d", a.delivery, a.seq)
  append(a.id, entry, "chunks", a.chunks, "end", a.tail)
  finish(job, a.kind, a.tail, entry)
  tell(job, entry, a.chunks, a.tail)
  return 1
end

function op.give_back(a)
  local job = held(a)
  if not job then return 0 end
  let_go(job)
  charge_job(job, -job.cost)
  wait(job)
  return 1
end

function op.cancel(a)
  local job = read(a.id)
  if not job or job.state == "ended" then return 0 end
  finish(job, "cancelled", a.tail)
  return 1
end

-- Of a worker that is gone: forgotten as soon as others have taken over what it had.
local function dismiss(name)
  local mine = redis.pcall("XPENDING", key("work"), "workers", "-", "+", 1, name)
  if type(mine) == "table" and not mine.err then
    if #mine > 0 then return end
    redis.pcall("XGROUP", "DELCONSUMER", key("work"), "workers", name)
  end
  call("SREM", key("names"), name)
end

function op.leave(a)
  call("DEL", key("worker", a.worker))
  dismiss(a.worker)
  return 1
end

function op.stats()
  local cards = {}
  for _, name in ipairs(call("SMEMBERS", key("names"))) do
    local card = call("GET", key("worker", name))
    if card then cards[#cards + 1] = card else dismiss(name) end
  end
  local units = call("HMGET", key("units"), "high", "normal", "low")
  local load = call("HMGET", key("load"), "waiting", "claimed", "redelivered")
  local num_tenants = 0
  for _, scope in ipairs({ "high", "normal", "low" }) do
    num_tenants = math.max(num_tenants, call("ZCARD", key("fair", scope)))
  end
  local first = call("ZRANGE", key("since"), 0, 0, "WITHSCORES")
  local oldest = first[2] and now - tonumber(first[2]) or 0
  return cjson.encode({
    tonumber(load[1] or 0), tonumber(units[1] or 0) + tonumber(units[2] or 0) + tonumber(units[3] or 0),
    tonumber(load[2] or 0), num_tenants, cards, call("HGETALL", key("ended")), tonumber(load[3] or 0),
    oldest,
  })
end

return op[ARGV[1]](cjson.decode(ARGV[2]))
