-- 1 where the answer found in the completion equals `answer` of the row, 0 where it does not; abstains without a gold.
-- The answer is looked for in <answer> tags, \boxed{}, "the answer is …", and last as a plain expression.
function reward(sample, ctx)
  if sample.answer == nil then return nil end
  local found = rft.math.extract(sample.completion)
  if found == nil then return 0 end
  return rft.math.equal(tostring(sample.answer), found) and 1 or 0
end
