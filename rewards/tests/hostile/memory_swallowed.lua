-- may end in: memory not_finite timeout instructions
function reward(sample, ctx)
  if sample.completion == "bad" then
    do pcall(function() local t = {} while true do t[#t + 1] = string.rep("x", 1000) .. #t end end) return 0 / 0 end
  end
  if secret ~= nil or ctx.options.x ~= nil or sample.extra ~= nil then return -1 end
  return #sample.completion
end
