-- 1 where the completion is a number with at most two words around it: something the math verifier can read.
function reward(sample, ctx)
  local before, after = string.match(sample.completion, "^%s*(.-)%-?%$?%d[%d,]*%.?%d*(.-)%s*$")
  if before == nil then return 0 end
  local words = 0
  for _ in string.gmatch(before .. " " .. after, "%S+") do words += 1 end
  return words <= 2 and 1 or 0
end
