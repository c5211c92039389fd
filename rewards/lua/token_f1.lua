-- Token F1 of the answer against `answer` of the row (a text or a list of texts: the best counts), as SQuAD scores; abstains
-- without a gold. Two empty texts agree, so a row with an empty gold ("no answer") is earned by an empty answer only.
function reward(sample, ctx)
  local golds = sample.answer
  if golds == nil then return nil end
  if type(golds) ~= "table" then golds = { golds } end
  local given = rft.text.tag(sample.completion, "answer") or rft.text.after_think(sample.completion)
  local best = 0
  for _, gold in golds do
    best = math.max(best, rft.text.f1(given, tostring(gold)).f1)
  end
  return best
end
