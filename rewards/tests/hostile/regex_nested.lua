-- may end in: timeout instructions runtime ok
function reward(sample, ctx)
  if sample.completion == "bad" then
    do for i = 1, 1e9 do rft.regex.test(string.rep("a", 30000) .. "!", "(a+)+$") end end
  end
  if secret ~= nil or ctx.options.x ~= nil or sample.extra ~= nil then return -1 end
  return #sample.completion
end
