-- Tool calls. Option kind decides how they are judged:
--   "exact" (default): 1 where the completion makes exactly the calls of `calls` ({name, arguments} each), in any order, else 0;
--     option format names the text format (any is recognised without it);
--   "toolrl": ToolRL's reward against `solution` (the gold turn), components format, correctness and, with_length on, length;
--     options refined, coarse, intermediate, correct_max1, max1_step30_max3, schedule, with_length, schedule_length;
--   "bfcl": 1 where the Berkeley leaderboard's checker passes it against `functions` and `possible_answer`, else 0;
--     options decode ("hermes" or "python"), underscore_to_dot, greedy, ignore_broken_blocks; the row's `category`.
--     (both fields may be JSON text, which keeps 5.0 apart from 5; the leaderboard itself has greedy and ignore_broken_blocks on).
-- Abstains where the row lacks the gold.
local TOOLRL = { "refined", "coarse", "intermediate", "correct_max1", "max1_step30_max3", "schedule", "with_length", "schedule_length" }
local BFCL = { "decode", "underscore_to_dot", "greedy", "ignore_broken_blocks" }

local function pick(options, names, given)
  for _, name in names do given[name] = options[name] end
  return given
end

local function category(name)
  for _, word in { "irrelevance", "relevance", "parallel", "multiple" } do
    if string.find(name, word, 1, true) then return word end
  end
  return "simple"
end

local function exact(sample, ctx)
  if sample.calls == nil then return nil end
  local calls = rft.tools.parse(sample.completion, ctx.options.format)
  if #calls ~= #sample.calls then return 0 end
  local used = {}
  for _, gold in sample.calls do
    local match
    for i, call in calls do
      if not used[i] and call.name == gold.name and rft.json.equal(call.arguments, gold.arguments) then match = i break end
    end
    if match == nil then return 0 end
    used[match] = true
  end
  return 1
end

function reward(sample, ctx)
  local kind = ctx.options.kind or "exact"
  if kind == "exact" then return exact(sample, ctx) end
  if kind == "toolrl" then
    if sample.solution == nil then return nil end
    local found = rft.tools.toolrl(sample.completion, sample.solution, pick(ctx.options, TOOLRL, { step = ctx.step }))
    return { format = found.format, correctness = found.correctness, length = ctx.options.with_length and found.length or nil }
  end
  if kind ~= "bfcl" then error("unknown kind " .. kind .. "; use exact, toolrl or bfcl") end
  if sample.functions == nil then return nil end
  local options = pick(ctx.options, BFCL, { category = category(sample.category or "simple") })
  return rft.tools.bfcl(sample.completion, sample.functions, sample.possible_answer, options).valid and 1 or 0
end
