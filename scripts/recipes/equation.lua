-- Credit for showing the sum: 0.5 for an equation a op b = c whose a and b stand in the question, 0.5 more where it holds.
local function numbers(text)
  local found = {}
  for number in string.gmatch(text, "%d+%.?%d*") do found[tonumber(number)] = true end
  return found
end

local HOLDS = {
  ["+"] = function(a, b) return a + b end,
  ["-"] = function(a, b) return a - b end,
  ["*"] = function(a, b) return a * b end,
  ["/"] = function(a, b) return a / b end,
}

function reward(sample, ctx)
  local a, op, b, c = string.match(sample.completion, "(%d+)%s*([%+%-%*/])%s*(%d+)%s*=%s*(%d+)")
  if a == nil then return 0 end
  a, b, c = tonumber(a), tonumber(b), tonumber(c)
  local asked = numbers(sample.question)
  if not (asked[a] and asked[b]) then return 0 end
  return HOLDS[op](a, b) == c and 1 or 0.5
end
