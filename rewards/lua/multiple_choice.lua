-- 1 where the chosen letter is `answer` of the row, else 0; abstains where the row's answer is no letter on offer.
-- Reads `answer` ("B") and, if there, `choices` (their number gives the letters). Options: letters ("ABCD").
-- A completion that names several letters as its answer ("A or B") chooses nothing.
function reward(sample, ctx)
  local letters = ctx.options.letters or "ABCD"
  if type(sample.choices) == "table" then letters = string.sub("ABCDEFGHIJKLMNOPQRSTUVWXYZ", 1, #sample.choices) end
  local gold = sample.answer and string.upper(rft.text.trim(tostring(sample.answer)))
  if gold == nil or #gold ~= 1 or not string.find(letters, gold, 1, true) then return nil end
  local text = rft.text.tag(sample.completion, "answer") or rft.text.after_think(sample.completion)
  local boxed = rft.regex.match(text, "\\\\boxed\\{\\s*(?:\\\\text\\{)?\\s*\\(?([A-Za-z])\\)?\\s*\\}")
  if boxed then return string.upper(boxed[1]) == gold and 1 or 0 end
  local short = rft.text.trim(text)
  if #short <= 40 then
    local named = {}
    for _, found in rft.regex.find_all(short, "\\b([" .. letters .. "])\\b") do named[found[1]] = true end
    local only = next(named)
    if only and next(named, only) then return 0 end
  end
  return rft.text.choice(text, letters) == gold and 1 or 0
end
