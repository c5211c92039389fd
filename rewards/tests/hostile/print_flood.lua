-- may end in: timeout instructions ok
function reward(sample, ctx)
  if sample.completion == "bad" then
    do for i = 1, 1e4 do print(string.rep("x", 1000)) end return 1 end
  end
  if secret ~= nil or ctx.options.x ~= nil or sample.extra ~= nil then return -1 end
  return #sample.completion
end
