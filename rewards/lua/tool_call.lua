-- 1 where the completion makes exactly the calls of `calls` of the row ({name, arguments} each), in any order; else 0.
local function equal(a, b)
  if type(a) ~= type(b) then return false end
  if type(a) ~= "table" then return a == b end
  for key, value in a do
    if not equal(value, b[key]) then return false end
  end
  for key in b do
    if a[key] == nil then return false end
  end
  return true
end

function reward(sample, ctx)
  if sample.calls == nil then return nil end
  local calls = rft.tools.parse(sample.completion)
  if #calls ~= #sample.calls then return 0 end
  local used = {}
  for _, gold in sample.calls do
    local match
    for i, call in calls do
      if not used[i] and call.name == gold.name and equal(call.arguments, gold.arguments) then match = i break end
    end
    if match == nil then return 0 end
    used[match] = true
  end
  return 1
end
