-- What service.affinity does in Serve's own proxies, in HAProxy: the server of a request's session.
--
-- `http-request lua.session_home LIMIT` in a backend sets txn.session_home to the name of the first
-- server, in the session's rendezvous order, with fewer than LIMIT requests in flight, or of the
-- least loaded one where none is below. Without the header `x-session-id` it sets nothing.

local HEADER = "x-session-id"

local function serves(stats)
    -- "UP", "UP 1/2" while it goes down, "no check"; not "DRAIN", "MAINT", "DOWN".
    return stats["bck"] ~= 1 and (stats["status"]:sub(1, 2) == "UP" or stats["status"] == "no check")
end

local function home(txn, limit)
    local values = txn.http:req_get_headers()[HEADER]
    local session = values and values[0]
    if not session or session == "" then
        return
    end
    local best, best_weight, least, least_load, least_weight
    for name, server in pairs(core.backends[txn.f:be_name()].servers) do
        local stats = server:get_stats()
        if serves(stats) then
            local weight = txn.c:xxh64(#session .. ":" .. session .. name, 0)
            local load = stats["scur"]
            if load < tonumber(limit) and (not best or weight > best_weight) then
                best, best_weight = name, weight
            end
            if not least or load < least_load or (load == least_load and weight > least_weight) then
                least, least_load, least_weight = name, load, weight
            end
        end
    end
    local chosen = best or least
    if chosen then
        txn:set_var("txn.session_home", chosen)
    end
end

core.register_action("session_home", { "http-req" }, home, 1)
