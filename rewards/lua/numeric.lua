-- 1 where the number in the completion is close to `answer` of the row, else 0; abstains without a gold number.
-- Options: rel (1e-6, share of the gold), abs (1e-9), partial (0; the reward at twice the tolerance or more is 0,
-- with partial = s a miss earns max(0, 1 - |error| / (s * max(|gold|, 1)))).
function reward(sample, ctx)
  local gold = tonumber(sample.answer) or rft.math.number(tostring(sample.answer))
  if gold == nil then return nil end
  local found = rft.math.extract(sample.completion)
  local given = found and rft.math.number(found)
  if given == nil then return 0 end
  local miss = math.abs(given - gold)
  if miss <= math.max((ctx.options.rel or 1e-6) * math.abs(gold), ctx.options.abs or 1e-9) then return 1 end
  local scale = ctx.options.partial or 0
  if scale == 0 then return 0 end
  return math.max(0, 1 - miss / (scale * math.max(math.abs(gold), 1)))
end
