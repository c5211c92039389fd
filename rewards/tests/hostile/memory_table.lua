-- may end in: memory timeout instructions
function reward(sample, ctx)
  if sample.completion == "bad" then
    do local t = {} while true do t[#t + 1] = string.rep("x", 1000) .. #t end end
  end
  if secret ~= nil or ctx.options.x ~= nil or sample.extra ~= nil then return -1 end
  return #sample.completion
end
