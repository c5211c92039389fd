-- Lua code judged by cases: the share of `cases` ({args = {…}, expect = …}) that the function `entry` of the row gets right, each
-- case in a fresh VM without io, os or this script. The code is the last ```lua fence, else what follows </think>.
-- Abstains without cases. Options: all (false; all or nothing), steps (100000 a case), time_ms (50 a case).
function reward(sample, ctx)
  if type(sample.cases) ~= "table" or #sample.cases == 0 then return nil end
  local text = rft.text.after_think(sample.completion)
  local fences = rft.regex.find_all(text, "(?s)```(?:lua|luau)?\\s*\\n(.*?)```")
  if #fences > 0 then text = fences[#fences][1] end
  local args = {}
  for i, case in sample.cases do args[i] = case.args or {} end
  local results = rft.code.run(text, sample.entry or "solve", args, {
    steps = ctx.options.steps or 100000, time_ms = ctx.options.time_ms or 50,
  })
  local right = 0
  for i, result in results do
    if result.ok and rft.json.equal(result.value, sample.cases[i].expect) then right += 1 end
  end
  if ctx.options.all then return right == #sample.cases and 1 or 0 end
  return right / #sample.cases
end
