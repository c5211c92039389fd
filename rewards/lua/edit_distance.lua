-- 1 - edit distance / longer length, in characters, between the answer and `answer` of the row; abstains without a gold.
-- Answers beyond 4000 characters are cut. Options: threshold (0; below it the reward is 0).
function reward(sample, ctx)
  if sample.answer == nil then return nil end
  local given = rft.text.trim(rft.text.tag(sample.completion, "answer") or rft.text.after_think(sample.completion))
  local gold = rft.text.trim(tostring(sample.answer))
  if given == "" or gold == "" then return given == gold and 1 or 0 end
  local similarity = rft.text.similarity(string.sub(given, 1, 4000), string.sub(gold, 1, 4000))
  return similarity < (ctx.options.threshold or 0) and 0 or similarity
end
