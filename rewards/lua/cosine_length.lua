-- Cosine length reward (TRL's cosine-scaled reward): right answers earn more when short, wrong ones lose less when long.
-- Reads `answer` (checked as `math` does) or `correct` (a boolean already known); abstains without either, or without tokens.
-- Options: max_len (1024), min_wrong (-1), max_wrong (-0.5), min_correct (0.5), max_correct (1).
function reward(sample, ctx)
  local correct = sample.correct
  if correct == nil and sample.answer ~= nil then
    correct = rft.math.check(tostring(sample.answer), sample.completion) == "equal"
  end
  local length = sample.length or (sample.tokens and #sample.tokens)
  if correct == nil or length == nil then return nil end
  local options = ctx.options
  return rft.shape.cosine(length, options.max_len or 1024, correct, {
    min_wrong = options.min_wrong or -1, max_wrong = options.max_wrong or -0.5,
    min_correct = options.min_correct or 0.5, max_correct = options.max_correct or 1,
  })
end
