-- 1 where the answer is the gold text, 0 where it is not; abstains without a gold.
-- Reads `answer` (a text, or a list of texts that all count). The answer is the last <answer>…</answer>, else what
-- follows </think>, else the whole completion. Options: case_sensitive (false), normalize (false; drop punctuation and articles).
local function shape(text, options)
  if options.normalize then return rft.text.normalize(text) end
  text = rft.text.trim(text)
  return options.case_sensitive and text or string.lower(text)
end

function reward(sample, ctx)
  local golds = sample.answer
  if golds == nil then return nil end
  if type(golds) ~= "table" then golds = { golds } end
  local given = rft.text.tag(sample.completion, "answer") or rft.text.after_think(sample.completion)
  given = shape(given, ctx.options)
  if given == "" then return 0 end
  for _, gold in golds do
    if shape(tostring(gold), ctx.options) == given then return 1 end
  end
  return 0
end
