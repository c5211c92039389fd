-- may end in: ok timeout instructions
function reward(sample, ctx)
  if sample.completion == "bad" then
    do local r = rft.code.run("function solve() local t = {} while true do t[#t+1] = string.rep('x', 1e6) .. #t end end", "solve", { {} }) return r[1].ok and 1 or 0 end
  end
  if secret ~= nil or ctx.options.x ~= nil or sample.extra ~= nil then return -1 end
  return #sample.completion
end
