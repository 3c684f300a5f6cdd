-- Written by `memfaas slurm install`; to change it, run that again.
--
-- A job that says `#BB_LUA pool=memfaas capacity=4GiB` finds a store of that size, and in its
-- environment where it is: MEMFAAS_BROKER, MEMFAAS_STORE, MEMFAAS_SECRET_FILE.
--
-- slurmctld calls job_process, pools and paths while it holds its locks, so these ask nobody; the other
-- functions run in a process of their own. Those that have nothing to do must be there all the same.

local call = @CALL@ -- stores.py with its options, for a shell
local broker = @BROKER@
local store = @STORE@ -- its name; %s is the job
local key = @KEY@ -- the file that each node's Prolog writes for a job
local pools = @POOLS@ -- file that says what the pool has

-- Words for a shell, each quoted.
local function quoted(...)
    local words = {}
    for _, word in ipairs({...}) do
        words[#words + 1] = "'" .. string.gsub(tostring(word), "'", "'\\''") .. "'"
    end
    return table.concat(words, " ")
end

-- Runs it; true, or false and what it said. The shell says the exit status: Lua 5.1 does not tell it.
local function run(...)
    local pipe = io.popen("timeout -k 1 120 " .. call .. " " .. quoted(...) .. "; echo exit status $?")
    local text = pipe:read("*a")
    pipe:close()
    local said, last = string.match(text, "^(.-)%s*(exit status %d+)%s*$")
    return last == "exit status 0", said ~= "" and said or last
end

local function content(path)
    local file = io.open(path)
    if not file then
        return nil
    end
    local text = file:read("*a")
    file:close()
    return text
end

-- Slurm has refused by now what asks another pool, but not what asks none.
function slurm_bb_job_process(job_script)
    local script = content(job_script) or ""
    if string.find(script, "#BB_LUA") and not string.find(script, "#BB_LUA[^\n]*pool=memfaas") then
        return slurm.ERROR, "say which pool, and how much: #BB_LUA pool=memfaas capacity=4GiB"
    end
    return slurm.SUCCESS
end

-- What was found out at the last call; and it is found out anew, in the background.
function slurm_bb_pools()
    local said = content(pools)
    os.execute("timeout -k 1 60 " .. call .. " " .. quoted("pools", pools) .. " > /dev/null 2>&1 < /dev/null &")
    return slurm.SUCCESS, said or '{"pools": [{"id": "memfaas", "quantity": 0, "granularity": @GRANULE@}]}'
end

function slurm_bb_setup(job_id, uid, gid, pool, bb_size, job_script)
    local fine, said = run("setup", job_id, uid, bb_size)
    if not fine then
        slurm.log_error("memfaas: job %s gets no store: %s", job_id, said)
        return slurm.ERROR, said
    end
    return slurm.SUCCESS
end

function slurm_bb_paths(job_id, job_script, path_file)
    local file = io.open(path_file, "w")
    file:write("MEMFAAS_BROKER=", broker, "\n")
    file:write("MEMFAAS_STORE=", string.format(store, job_id), "\n")
    file:write("MEMFAAS_SECRET_FILE=", string.format(key, job_id), "\n")
    file:close()
    return slurm.SUCCESS
end

-- A broker that is away keeps no job from ending: the store is deleted when it is back.
function slurm_bb_job_teardown(job_id, job_script, hurry)
    local fine, said = run("teardown", job_id)
    if not fine then
        slurm.log_error("memfaas: the store of job %s will be deleted later: %s", job_id, said)
    end
    return slurm.SUCCESS
end

function slurm_bb_data_in()
    return slurm.SUCCESS
end

function slurm_bb_test_data_in()
    return slurm.SUCCESS
end

function slurm_bb_real_size()
    return slurm.SUCCESS
end

function slurm_bb_pre_run()
    return slurm.SUCCESS
end

function slurm_bb_post_run()
    return slurm.SUCCESS
end

function slurm_bb_data_out()
    return slurm.SUCCESS
end

function slurm_bb_test_data_out()
    return slurm.SUCCESS
end

function slurm_bb_get_status()
    return slurm.SUCCESS, content(pools) or ""
end
